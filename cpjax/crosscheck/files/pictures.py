"""A picture in a new file, .svg or .png, the same bytes each time. Needs the extra cpjax[draw], matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpjax.crosscheck.files.atomic import atomic_write
from cpjax.errors import InputError


def check_picture(path: Path) -> None:
    """Refuse, before anything is computed, what could not be written at the end.

    Raises:
      InputError: another suffix than .svg and .png, a file that is there already, or no matplotlib.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"--draw {path} must end in .svg or .png")
    if path.exists():
        raise InputError(f"--draw {path} is there already; move it away, or give another name")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("drawing needs matplotlib; pip install 'cpjax[draw]'") from None


def write_picture(path: Path, figure: Callable[[], Any], *, dpi: int, with_letters: bool = False) -> None:
    """Write a matplotlib Figure, whole or not at all.

    Args:
      figure: makes it; called when nothing of `check_picture` stands against it.
      dpi: dots per inch, of .png.
      with_letters: the letters of an .svg stay letters; otherwise they are outlines.

    Raises:
      InputError: as `check_picture`; or it cannot be written.
    """
    check_picture(path)
    from matplotlib import rc_context

    kind = path.suffix.lower()[1:]
    letters = "none" if with_letters else "path"
    try:
        # The same picture has the same bytes: no date, and names of its parts that are not random.
        with atomic_write(path) as unfinished, rc_context({"svg.hashsalt": "cpjax", "svg.fonttype": letters}):
            figure().savefig(unfinished, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise InputError(f"--draw {path} cannot be written ({error.strerror or error})") from None
