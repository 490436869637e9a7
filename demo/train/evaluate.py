"""Says how good a checkpoint is, by the checker, and saves a sheet of its pictures."""

from pathlib import Path

import click
import numpy as np
from PIL import Image

from train.export import base_pipeline
from train.networks import new_unet
from train.runs import Checkpoint, lowest_priority
from understudy_demo.quality import STEPS, judge, kinds_of_faults, paint, passed_percent, sample_wishes
from understudy_demo.styles import BASE, FINE_TUNES


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True)
@click.option("--style", default=BASE, type=click.Choice([BASE, *FINE_TUNES]), show_default=True)
@click.option("--count", type=int, default=50, show_default=True)
@click.option("--steps", type=int, default=STEPS, show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path))
def main(work: Path, style: str, count: int, steps: int, sheet: Path | None) -> None:
    """Judge pictures of COUNT sampled wishes."""
    lowest_priority(1)
    pipeline = base_pipeline(work)
    if style in FINE_TUNES:
        unet = new_unet()
        unet.load_state_dict(Checkpoint.smoothed(work / f"unet-{style}.safetensors"))
        pipeline.register_modules(unet=unet.eval())
    pipeline.set_progress_bar_config(disable=True)
    wishes = sample_wishes(count, 99)
    pictures = paint(pipeline, wishes, 500, steps)
    judged = judge(pictures, wishes, style)
    print(f"{passed_percent(judged):.0f} % of {count} pass; {dict(kinds_of_faults(judged))}")
    if sheet is not None:
        rows = [np.concatenate(pictures[i : i + 10], 1) for i in range(0, count - count % 10, 10)]
        Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(sheet)
        for each in judged:
            print(f"  {each.wish.caption}: {', '.join(each.faults) or 'ok'} ({each.looks_like})")


if __name__ == "__main__":
    main()
