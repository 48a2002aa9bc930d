"""The page of `sit_composer.demo`: generates what `sit_composer.sample` would, and shows how it forms."""

import argparse
import shlex
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import torch

from sit_composer.autoencoder import Autoencoder
from sit_composer.checkpoint.folder import CHECKPOINT
from sit_composer.checkpoint.load import find_checkpoint, load_checkpoint
from sit_composer.checkpoint.record import Checkpoint, NoSuchWeights
from sit_composer.choices import ADAPTIVE_METHODS, ODE_METHODS, SDE_METHODS
from sit_composer.cli import is_remote, say
from sit_composer.errors import UserError, first_line
from sit_composer.film import CONTROLS, STYLE, as_html, film
from sit_composer.gallery import choose_labels, complete
from sit_composer.sample import parse
from sit_composer.sit import SiT

SOLVERS = [*(f"ODE {name}" for name in ODE_METHODS), *(f"SDE {name}" for name in SDE_METHODS)]
PROGRESS = gr.Progress()


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch refuses a name, or a device that isn't there
        raise UserError(f"--device: got {device}: {first_line(error)}") from None
    warnings.filterwarnings("ignore", module="gradio")  # of what it should call otherwise in its own libraries
    page = Demo(args.checkpoints, device).page()
    host = f"[{args.host}]" if ":" in args.host else args.host  # as in the page's address
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=args.port, css=STYLE, share=False, ssr_mode=False, mcp_server=False,
            enable_monitoring=False, footer_links=[], prevent_thread_lock=True, quiet=True, show_error=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port: {first_line(error)}") from None
    except ValueError as error:  # how it says that it can't reach its own page
        raise UserError(f"--host: got {args.host}: {first_line(error)}") from None
    say(f"{address}   (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


class Stopped(Exception):
    """Stop was pressed, or the page closed."""


class Demo:
    """The page of checkpoints, which are loaded at first; a mistake in them is a UserError."""

    def __init__(self, paths: list[str], device: str):
        self.device = device
        self.places = {path: str(find_checkpoint(path)) for path in paths}  # a run's newest checkpoint stays the same
        self.load = lru_cache(maxsize=len(paths))(self._load)
        self.stopped: set[str | None] = set()  # sessions whose work is to end
        self.busy: set[str | None] = set()  # sessions whose work is under way, or waits for others'
        self.guided = True  # whether all of them can be
        self.classes: list[str] = []
        self.weights: list[str] = []
        for path in paths:
            try:
                record = self.load(path, "ema")[0].record
                self.weights += ["ema", *(f"ema:{name}" for name in record.averages or [])]
            except NoSuchWeights:
                record = self.load(path, "training")[0].record
            self.classes = self.classes or record.classes
            self.guided &= record.has_null_class
        self.weights = list(dict.fromkeys([*self.weights, "training"]))

    def _load(self, path: str, weights: str) -> tuple[Checkpoint, SiT, Autoencoder]:
        found = load_checkpoint(self.places[path], weights)
        network, autoencoder = found.build_network(self.device), found.load_autoencoder(self.device)
        return replace(found, weights={}), network, autoencoder

    def page(self) -> gr.Blocks:
        """The page's components, and what they do."""
        known, paths = self.classes, list(self.places)
        labels = [(n, n) if known.count(n) == 1 else (f"{n} ({i})", str(i)) for i, n in enumerate(known)]
        with gr.Blocks(title="sit_composer", analytics_enabled=False) as page, gr.Row():
            with gr.Column(scale=1, min_width=300):
                chosen = gr.CheckboxGroup(
                    paths, value=paths, label="checkpoints", visible=len(paths) > 1, elem_classes="paths"
                )
                label = gr.Dropdown([("each in turn", ""), *labels], value="", label="class")
                count = gr.Slider(1, 16, value=4, step=1, label="images")
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, min_width=80)
                    scale = gr.Number(1.5 if self.guided else 1, label="guidance scale", min_width=80)
                start = gr.Slider(0, 1, value=0, step=0.05, label="guide from (noise is at 0)")
                end = gr.Slider(0, 1, value=1, step=0.05, label="guide until (data is at 1)")
                with gr.Row():
                    solver = gr.Dropdown(SOLVERS, value="ODE heun", label="solver", min_width=80)
                    steps = gr.Number(50, label="time points", precision=0, min_width=80)
                which = gr.Dropdown(self.weights, value=self.weights[0], label="weights")
                with gr.Row():
                    press = gr.Button("Generate", variant="primary", min_width=80)
                    stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=3, min_width=300):
                films = gr.HTML("<p>Press Generate.</p>", min_height=120)
            settings = [chosen, label, count, seed, scale, start, end, solver, steps, which]
            begin = press.click(self.begin, queue=False, api_visibility="private")
            begin.then(self.generate, settings, films, api_visibility="private")
            stop.click(self.stop, queue=False, api_visibility="private")
            solver.change(lambda name: gr.update(visible=name.split()[1] not in ADAPTIVE_METHODS), solver, steps)
            page.unload(self.stop)
        return page

    def generate(self, request: gr.Request, progress: gr.Progress = PROGRESS, *settings: Any) -> str:
        """HTML of the films, or of the mistake in the settings."""

        def tell(done: float) -> None:
            if request.session_hash in self.stopped:
                raise Stopped
            progress(done, "generating")

        try:
            return self.films(tell, *settings)
        except Stopped:
            return "<p>stopped</p>"
        except (UserError, OSError) as error:
            return f'<p role="alert" class="error">{escape(str(error))}</p>'
        finally:
            self.busy.discard(request.session_hash)

    def begin(self, request: gr.Request) -> None:
        """Forgets the stop of earlier work, when Generate is pressed; the work may have to wait, and can be stopped."""
        if request.session_hash not in self.busy:
            self.stopped.discard(request.session_hash)
        self.busy.add(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """Ends the session's work at its next evaluation."""
        self.stopped.add(request.session_hash)

    def films(self, tell: Callable[[float], None], chosen: list[str], *settings: Any) -> str:
        """HTML of how the images of the chosen checkpoints form; ``tell`` gets the part of the work that is done."""
        if not chosen:
            raise UserError("checkpoints: got none, expected at least one")
        words, films = options(*settings), []
        for i, path in enumerate(chosen):
            place = lasting(path, self.places[path])
            args = parse([place, "--out=DIR", *words], refuse)
            checkpoint, network, autoencoder = self.load(path, args.weights)
            record = checkpoint.record
            complete(args, record)
            labels, part = choose_labels(args, record.classes), lambda t, i=i: tell((i + t) / len(chosen))
            images, frames = film(record, network, autoencoder, args.sampling, labels, part)
            command = shlex.join(["python", "-m", "sit_composer.sample", place, "--out=DIR", *words])
            title = f"{path}, step {checkpoint.step}, {checkpoint.which}"
            films.append(as_html(title, command, [record.classes[label] for label in labels], images, frames))
        return f'<div class="demo" style="--frame:5;--row:0">{CONTROLS}<div class="films">{"".join(films)}</div></div>'


def lasting(path: str, place: str) -> str:
    """Where the checkpoint at ``place`` is found again: there or, if it is a copy of a remote ``path``'s, its URI."""
    name, uri = Path(place).name, path.rstrip("/")
    if not is_remote(path):
        return place
    return f"{uri}/{name}" if CHECKPOINT.fullmatch(name) and not uri.endswith(f"/{name}") else path


def options(
    label: str, count: int, seed: int, scale: float, start: float, end: float, solver: str, steps: int, weights: str
) -> list[str]:
    """The options of `sit_composer.sample` for the page's settings: those that have an effect."""
    mode, method = solver.split()
    words = [f"--classes={label}", f"--per-class={count}"] if label else [f"--num-images={count}"]
    words += [f"--seed={seed}", f"--weights={weights}", f"--cfg-scale={scale}"]
    if scale != 1 and (start, end) != (0, 1):
        words += ["--cfg-interval", str(start), str(end)]
    words += [f"--mode={mode}", f"--sampling-method={method}"]
    return words if method in ADAPTIVE_METHODS else [*words, f"--num-steps={steps}"]


def refuse(message: str) -> NoReturn:
    raise UserError(message.removeprefix("argument "))
