"""The demo, scene by scene: make, ingest, serve the old way, serve with Understudy, compare, draw."""

import asyncio
import contextlib
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from understudy.trace import Span, fetch, lane
from understudy_demo import baseline, pictures, show, traffic
from understudy_demo.baseline import Baseline, BaselineRun
from understudy_demo.family import family_key, make_family
from understudy_demo.measure import Turn, figures, turns
from understudy_demo.members import Member
from understudy_demo.quality import GUIDANCE
from understudy_demo.serving import DaemonProcess, DaemonSettings, rate_for, running_daemon, short_runtime_dir
from understudy_demo.stocking import own_bytes, room_for, stock
from understudy_demo.verdicts import Judge, Verdict
from understudy_demo.workload import PROMPTS, Request, Shape, make_workload

Tick = Callable[[object], None]

_GALLERY_MODELS, _GALLERY_PROMPTS = 13, 5
_STEPS, _SIZE = 8, 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How large the demo is. `load_share` is how long a load takes, in image times; `pressure` the arrival
    rate, in images that one stage can make.
    """

    out: Path
    models: int = 24
    requests: int = 160
    clients: int = 4
    seed: int = 0
    load_share: float = 0.7
    pressure: float = 1.3


@dataclass(frozen=True, slots=True)
class Performance:
    """The daemon's run: what came back for the workload and the gallery, and what its lanes did."""

    workload: traffic.Traffic
    gallery: traffic.Traffic
    spans: list[Span]


class Demo:
    """One run of the demo. `play` returns the process's exit status."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self._console = console

    def play(self) -> int:
        plan = self.plan
        torch.set_num_threads(1)  # as the daemon's stage
        baseline.quiet()
        plan.out.mkdir(parents=True, exist_ok=True)
        members = self._family()
        folders = {member.name: member.path for member in members}
        store = plan.out / f"store-{family_key(plan.models, plan.seed)}"
        with self._scene("adding them to the store", plan.models) as tick:
            records = stock(store, members, tick)
        image_s = self._image_time_s(members)
        requests = self._workload(members, image_s)
        gallery = gallery_requests([member.name for member in members], requests)

        old = self._old_way(folders, requests)
        wanted = {(r.model, r.prompt, r.seed): r for r in gallery}
        with self._scene("the same images for the contact sheet", len(wanted)) as tick:
            old_gallery = Baseline(folders).run(sorted(wanted.values(), key=lambda r: r.model), tick)

        room = max(2, plan.models // 4)
        load_bytes = statistics.mean(own_bytes(records).values())
        settings = DaemonSettings(
            store=store,
            runtime_dir=short_runtime_dir(plan.out / "run"),
            arena_bytes=room_for(records, room),
            rate_limit_bytes_per_s=rate_for(load_bytes, plan.load_share * image_s),
        )
        performance = self._new_way(settings, requests, gallery)
        return self._report(members, settings, room, performance, old, old_gallery, requests, gallery)

    # -- scenes -------------------------------------------------------------------------------------

    def _family(self) -> tuple[Member, ...]:
        plan = self.plan
        folder = plan.out / f"family-{family_key(plan.models, plan.seed)}"
        with self._scene(f"making {plan.models} small Stable Diffusion models", plan.models) as tick:
            return make_family(folder, plan.models, plan.seed, tick)

    def _image_time_s(self, members: Sequence[Member]) -> float:
        with self._scene("timing an image", 1) as tick:
            image_s = baseline.image_time_s(members[0].path, _sample(members[0].name))
            tick(image_s)
        self._console.print(
            f"  an image takes {1e3 * image_s:.0f} ms here; loads are slowed to about "
            + f"{self.plan.load_share:g} of that, as a large model's load compares with its image on a GPU",
            style="dim",
        )
        return image_s

    def _workload(self, members: Sequence[Member], image_s: float) -> list[Request]:
        plan = self.plan
        shape = Shape(
            requests=plan.requests,
            clients=plan.clients,
            rate_per_s=plan.pressure / image_s,
            exponent=0.8,
            burst=1.6,
            spread_s=image_s,
            variants=len(PROMPTS),
            steps=(_STEPS,),
            size=_SIZE,
            guidance=GUIDANCE,
        )
        return make_workload([member.name for member in members], shape, plan.seed)

    def _old_way(self, folders: Mapping[str, Path], requests: Sequence[Request]) -> BaselineRun:
        server = Baseline(folders)
        server.warm_up(requests[:2])
        with self._scene("serving with from_pretrained per switch", len(requests)) as tick:
            return server.run(requests, tick)

    def _new_way(
        self, settings: DaemonSettings, requests: Sequence[Request], gallery: Sequence[Request]
    ) -> Performance:
        with contextlib.ExitStack() as stack:
            with self._scene("starting understudyd", 1) as tick:
                daemon = stack.enter_context(running_daemon(settings, self.plan.out))
                tick(daemon)
            workload = self._send(daemon, "serving with Understudy", requests)
            spans = fetch(daemon.ask, 3600.0).spans
            shown = self._send(daemon, "painting the contact sheet", gallery)
        return Performance(workload, shown, spans)

    def _send(self, daemon: DaemonProcess, label: str, requests: Sequence[Request]) -> traffic.Traffic:
        with self._scene(label, len(requests)) as tick:
            got = asyncio.run(traffic.send(daemon.endpoint, requests, tick))
        daemon.check()
        return got

    # -- the end ------------------------------------------------------------------------------------

    def _report(
        self, members: Sequence[Member], settings: DaemonSettings, room: int, performance: Performance,
        old: BaselineRun, old_gallery: BaselineRun, requests: Sequence[Request], gallery: Sequence[Request],
    ) -> int:  # fmt: skip
        taken = turns(performance.workload.served, lane(performance.spans, "stage"))
        old_taken = turns(old.served, lane(old.spans, "stage"))
        asked = [*requests, *gallery]
        got, wanted = _rows(performance), _old_rows(old, old_gallery)
        judge = Judge(members)
        verdicts = self._verdicts(judge, asked, got, wanted)
        title = f"{len(members)} models, room for {room} ({settings.arena_bytes / 2**20:.0f} MiB)"
        table = show.results_table(figures(taken), taken, figures(old_taken), verdicts, title)
        self._console.print()
        self._console.print(table)
        equal = sum(rows == wanted[index] for index, rows in got.items())
        self._console.print(f"\n{equal} of {len(asked)} images equal from_pretrained's, bit for bit")
        trained = {member.name for member in members if len(member.styles) == 1}
        of_trained = judge.verdict([request for request in asked if request.model in trained], got)
        self._console.print(f"{verdicts[0]} images show what was asked for by the model that was asked")
        self._console.print(f"  {of_trained} of the models that are no mixtures", style="dim")
        self._console.print(f"  {verdicts[0].in_style} images are in a style of their model", style="dim")
        for index, why in (performance.workload.failures | performance.gallery.failures).items():
            self._console.print(f"request {index} failed: {why}", style="red")
        self._draw(members, room, performance, old, asked, taken, old_taken)
        self._console.print("\ngo on by hand:")
        for command in show.commands(
            self.plan.out / "understudyd.toml", settings.runtime_dir, members[0].name
        ):
            self._console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)
        return 0 if equal == len(asked) else 1

    def _verdicts(self, judge: Judge, asked: Sequence[Request], *runs: Mapping[int, bytes]) -> list[Verdict]:
        """The checkers' word on each run's images."""
        verdicts = []
        with self._scene("looking at the images", len(runs)) as tick:
            for images in runs:
                verdicts.append(judge.verdict(asked, images))
                tick(images)
        return verdicts

    def _draw(
        self, members: Sequence[Member], room: int, performance: Performance, old: BaselineRun,
        requests: Sequence[Request], taken: Sequence[Turn], old_taken: Sequence[Turn],
    ) -> None:  # fmt: skip
        out, count = self.plan.out, len(members)
        ours, theirs = figures(taken), figures(old_taken)
        first_s = min((one.sent_s for one in performance.workload.served), default=0.0)
        spans = [span for span in performance.spans if span.end_s > first_s]
        timeline = pictures.timeline(
            [
                pictures.daemon_strip(
                    "Understudy: the next models load while the stage computes", spans, taken
                ),
                pictures.baseline_strip(
                    "from_pretrained per switch: computing waits for every load", old.spans, old_taken
                ),
            ],
            out / "timeline.png",
            title=f"{count} models, room for {room}: a visible switch takes "
            f"{show.milliseconds(ours.switch_ms_p50)}, with from_pretrained "
            f"{show.milliseconds(theirs.switch_ms_p50)}",
            subtitle=f"p99 {show.milliseconds(ours.switch_ms_p99)} and "
            f"{show.milliseconds(theirs.switch_ms_p99)}   ·   {ours.throughput_per_s:.1f} images/s and "
            f"{theirs.throughput_per_s:.1f}   ·   the same {ours.requests} requests, "
            "4 s of each run",
            colours={member.name: member.colour for member in members},
        )
        images = performance.workload.images | performance.gallery.images
        sheet = pictures.contact_sheet(
            gallery_sheet([member.name for member in members], requests, images),
            out / "contact-sheet.png",
            title=f"{min(_GALLERY_MODELS, count)} of {count} models, one daemon",
            subtitle="trained from scratch: a base, its fine-tunes, its LoRAs, one seed a row; "
            "every image equals from_pretrained's, bit for bit",
        )
        self._console.print(f"\npictures: {timeline}\n          {sheet}", highlight=False)

    @contextlib.contextmanager
    def _scene(self, label: str, total: int) -> Iterator[Tick]:
        """A progress bar while something happens; without a terminal, one line at its end."""
        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<42}"), BarColumn(24),
                   MofNCompleteColumn(), TimeElapsedColumn())  # fmt: skip
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(label, total=total)
            yield lambda _: progress.advance(task)


def _rows(performance: Performance) -> dict[int, bytes]:
    """Raw RGB rows of what the daemon sent, by the index of the request."""
    pngs = performance.workload.images | performance.gallery.images
    return {index: traffic.pixels(png) for index, png in pngs.items()}


def _old_rows(*runs: BaselineRun) -> dict[int, bytes]:
    return {index: image.tobytes() for run in runs for index, image in run.images.items()}


def _sample(model: str) -> Request:
    return _request(0, model, 0)


def _request(index: int, model: str, variant: int) -> Request:
    return Request(
        index, 0, model, PROMPTS[variant], 1_000 + variant, _STEPS, _SIZE, _SIZE, 0.0, guidance=GUIDANCE
    )


def gallery_requests(models: Sequence[str], requests: Sequence[Request]) -> list[Request]:
    """What the contact sheet of the first models needs beside the workload, indexed after it."""
    have = {(request.model, request.prompt) for request in requests}
    missing = [
        (model, variant)
        for model in models[:_GALLERY_MODELS]
        for variant in range(_GALLERY_PROMPTS)
        if (model, PROMPTS[variant]) not in have
    ]
    first = len(requests)
    return [_request(first + i, model, variant) for i, (model, variant) in enumerate(missing)]


def gallery_sheet(
    members: Sequence[str], requests: Sequence[Request], images: Mapping[int, bytes]
) -> pictures.Sheet:
    """The first models across, prompts down."""
    models, prompts = members[:_GALLERY_MODELS], PROMPTS[:_GALLERY_PROMPTS]
    by_wish: dict[tuple[str, str], bytes] = {}
    for request in requests:
        if request.index in images:
            by_wish.setdefault((request.model, request.prompt), images[request.index])

    def picture(model: str, prompt: str) -> Image.Image | None:
        png = by_wish.get((model, prompt))
        return None if png is None else Image.open(io.BytesIO(png)).convert("RGB")

    return pictures.Sheet(prompts, models, [[picture(m, p) for m in models] for p in prompts])
