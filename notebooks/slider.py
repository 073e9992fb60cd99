"""Pictures behind a slider, as one HTML output: it needs no server, no network, and no package beside matplotlib's.

Where scripts are taken out of the output (on GitHub, or in a notebook that is not trusted until its cell is run), there
is no slider, and the pictures stand one below the other.
"""

import base64
import io
from collections.abc import Iterable
from html import escape

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image

COLOURS = 64
"""To how many colours a picture is reduced, which makes its file smaller by half and more."""

SCRIPT = """
for (const box of document.querySelectorAll(".frames:not(.ready)")) {
  box.classList.add("ready");
  const frames = [...box.querySelectorAll("figure")];
  const range = Object.assign(document.createElement("input"), {type: "range", min: 0, max: frames.length - 1});
  const button = Object.assign(document.createElement("button"), {type: "button"});
  const bar = Object.assign(document.createElement("div"), {style: "display: flex; align-items: center; gap: 1em"});
  let timer = null;
  const show = (number) => {
    frames.forEach((frame, other) => (frame.style.display = other === number ? "block" : "none"));
    range.value = number;
    range.setAttribute("aria-valuetext", frames[number].querySelector("figcaption").textContent);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "play";
  };
  button.onclick = () => {
    if (timer !== null) return stop();
    button.textContent = "stop";
    timer = setInterval(() => show((Number(range.value) + 1) % frames.length), 1000);
  };
  range.oninput = () => {
    stop();
    show(Number(range.value));
  };
  range.setAttribute("aria-label", "picture");
  range.style.flex = "0 1 20em";
  bar.append(button, range);
  box.prepend(bar);
  stop();
  show(0);
}
"""
"""Gives every box of pictures that has none its slider: arrow keys move it too."""


def slider(frames: Iterable[tuple[str, Figure]]) -> HTML:
    """Pairs of a picture's name, such as "step 2", and the picture, which is closed. All have one size."""
    images = "\n".join(
        f'<figure style="margin: 0.5em 0; text-align: left"><figcaption>{escape(name)}</figcaption>'
        f'<img alt="{escape(name)}" style="max-width: 100%" src="data:image/png;base64,{_png(figure)}"></figure>'
        for name, figure in frames
    )
    return HTML(f'<div class="frames">\n{images}\n</div>\n<script>{SCRIPT}</script>')


def _png(figure: Figure) -> str:
    """The picture as the text of a PNG file."""
    figure.canvas.draw()
    levels = np.asarray(figure.canvas.buffer_rgba())
    plt.close(figure)
    file = io.BytesIO()
    picture = Image.fromarray(levels).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
