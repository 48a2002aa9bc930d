"""How images form: the states that a solver passes, what the network expects of them, and both as HTML."""

import base64
import io
from collections.abc import Callable
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from sit_composer.autoencoder import Autoencoder, to_uint8
from sit_composer.checkpoint.record import Record
from sit_composer.choices import Sampling
from sit_composer.gallery import as_image
from sit_composer.generate import generate
from sit_composer.guidance import Guidance
from sit_composer.sit import SiT

Frame = tuple[list[Image.Image], list[Image.Image]]  # the images' states, and what the network expects them to become
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8)  # of the frames; the images follow
STYLE = """
.paths label {max-width: 100%}
.paths span {overflow-wrap: anywhere; white-space: normal}
.demo label {display: inline-flex; gap: .5em; align-items: center; margin-right: 1.5em}
.films {display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: 1rem}
.films > div {flex: 1 1 16rem; min-width: 0}
.films b, .films code {overflow-wrap: anywhere}
.films code {display: block; margin-top: .3rem; user-select: all}
.films img, .view {width: 100%; image-rendering: var(--pixels)}
.views {display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 6px; margin: .5rem 0}
.view {background: var(--film) calc(var(--frame) * 20%) calc(var(--row) * 100%) / 600% 200%; margin: 0}
.view img {display: block; opacity: calc(var(--frame) - 4)}
.error {color: var(--error-text-color); font-weight: 600}
"""
CONTROLS = """<label>noise <input type="range" max="5" value="5" aria-label="time"
oninput="this.closest('.demo').style.setProperty('--frame', value)"> image</label>
<label><input type="checkbox" onchange="this.closest('.demo').style.setProperty('--row', +checked)">
what the network expects at that time</label>"""


def film(
    record: Record, network: SiT, autoencoder: Autoencoder, sampling: Sampling, labels: list[int], tell: Callable
) -> tuple[list[Image.Image], list[Frame]]:
    """The images, and a frame for each of TIMES: of the first state at or after it that the solver evaluates."""
    transport = record.build_transport()
    frames: list[Frame] = []

    def decode(latents: Tensor) -> list[Image.Image]:
        return [as_image(levels) for levels in to_uint8(autoencoder.decode(latents)).cpu()]

    def watch(x: Tensor, t: Tensor, prediction: Tensor) -> None:
        now = float(t[0])
        tell(min(max(now, 0), 1))
        while len(frames) < len(TIMES) and now > TIMES[len(frames)] - 1e-3:
            # At t = 0 Tweedie's formula divides by 0; close to it, it gives the same.
            expected = transport.expected_data(lambda *_, **__: prediction, x, t.clamp(min=1e-3))
            frames.append((decode(x), decode(expected)))

    guidance = Guidance(network, sampling.cfg_scale, sampling.cfg_channels, sampling.cfg_interval)
    latents, _ = generate(guidance, transport, labels, list(range(len(labels))), sampling, watch)
    frames += [frames[-1]] * (len(TIMES) - len(frames))  # of a solver with fewer evaluations
    return decode(latents), frames


def as_html(title: str, command: str, captions: list[str], images: list[Image.Image], frames: list[Frame]) -> str:
    """The images, over films whose columns are times, the states above what is expected; and the first one's film."""
    side, views, films = images[0].width, [], []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        whole = Image.new(image.mode, (side * (len(TIMES) + 1), side * 2))
        for row in (0, 1):
            for column, cell in enumerate([*(frame[row][i] for frame in frames), image]):
                whole.paste(cell, (side * column, side * row))
        films.append(data_uri(whole, "WEBP", lossless=side <= 64, quality=85))
        shown = f'<img src="{data_uri(image, "PNG")}" alt="{escape(caption)}" title="{escape(caption)}">'
        views.append(f'<figure class="view" style="--film: url({films[-1]})">{shown}</figure>')
    return f"""<div style="--pixels: {"pixelated" if side < 128 else "auto"}"><b>{escape(title)}</b>
<div class="views">{"".join(views)}</div><img src="{films[0]}" alt="from noise to image">
<small>The first image from noise to data, and what the network expects meanwhile.
The same images: <code>{escape(command)}</code></small></div>"""


def data_uri(image: Image.Image, kind: str, **how: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
