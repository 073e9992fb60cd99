"""The slider of the notebooks: every picture is in the output, whole and named, and nothing is fetched."""

import base64
import io
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `notebooks` is not installed")
pytest.importorskip("IPython", reason="the extra `notebooks` is not installed")
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "notebooks"))
from slider import slider


def bars(cp: int) -> Figure:
    figure, axis = pyplot.subplots(figsize=(3, 2), dpi=50)
    axis.bar(range(cp), 1, color="#4477aa")
    return figure


def test_every_picture_is_there_and_named():
    open_before = pyplot.get_fignums()
    html = str(slider((f'cp "{cp}" & more', bars(cp)) for cp in (1, 2, 4)).data)
    names, files = zip(*re.findall(r'<img alt="([^"]*)"[^>]*base64,([A-Za-z0-9+/=]+)">', html), strict=True)
    assert names == tuple(f"cp &quot;{cp}&quot; &amp; more" for cp in (1, 2, 4))
    assert tuple(re.findall("<figcaption>(.*?)</figcaption>", html)) == names
    pictures = [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]
    assert {picture.size for picture in pictures} == {(150, 100)}
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert any(abs(level - 0x44) < 8 for level in pictures[0].convert("RGB").getchannel("R").tobytes())
    assert pyplot.get_fignums() == open_before


def test_nothing_is_fetched_and_without_scripts_all_pictures_show():
    html = str(slider([("step 0", bars(2))]).data)
    assert "://" not in html
    assert "display: none" not in html.partition("<script>")[0]
    assert "<input" not in html.partition("<script>")[0]
