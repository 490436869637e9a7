"""How good the demo's family is: `python -m benchmarks.demo_quality --json [--prompts N]`.

`passed_percent`: pictures of the base, 20 steps, for N prompts sampled from the demo's language (the same
each time), that show everything the prompt says: how many, which shape, size and colour, where, on what.
`style_confusion_percent`: pictures of the base, of each fine-tune and of each LoRA that look like another
one's. `weights_mb`: all committed weights, in 10^6 bytes. Pass rates of each model are told on stderr.

Both checkers are plain image statistics (`understudy_demo.checker`, `.style_checker`); how often they are
wrong about pictures that were drawn, not generated, is told as well.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.kit import json_line, say, show_table, timed

_WISHES_EACH = 25
_SEED = 4_000


def measure(prompts: int, each: int) -> dict[str, float]:
    import torch

    from understudy_demo import quality
    from understudy_demo.baseline import quiet
    from understudy_demo.family import weights_bytes
    from understudy_demo.styles import BASE

    torch.set_num_threads(1)
    quiet()
    rows, confused, judged_pictures, passed = [], 0, 0, 0.0
    for style, pipeline in _models():
        wishes = quality.sample_wishes(prompts if style == BASE else each, 0)
        with timed(style):
            judged = quality.judge(quality.paint(pipeline, wishes, _SEED), wishes, style)
        if style == BASE:
            passed = quality.passed_percent(judged)
        others = sum(one.looks_like != style for one in judged)
        confused, judged_pictures = confused + others, judged_pictures + len(judged)
        faults = ", ".join(
            f"{kind} {count}" for kind, count in quality.kinds_of_faults(judged).most_common(4)
        )
        rows.append([style, str(len(judged)), f"{quality.passed_percent(judged):.0f}", str(others), faults])
    show_table("trained models", ["model", "pictures", "passed %", "other style", "faults"], rows)
    return {
        "prompts": prompts,
        "passed_percent": passed,
        "style_confusion_percent": 100 * confused / judged_pictures,
        "weights_mb": weights_bytes() / 1e6,
    }


def _models() -> Iterator[tuple[str, Any]]:
    """Each trained model's style and pipeline, in full precision."""
    from understudy_demo.family import Kitchen
    from understudy_demo.recipes import trained
    from understudy_demo.trained import FOLDER

    kitchen = Kitchen(FOLDER)
    pipeline = kitchen.base()
    pipeline.set_progress_bar_config(disable=True)
    for recipe in trained():
        pipeline.register_modules(unet=kitchen.unet(recipe).eval())
        yield recipe.styles[0], pipeline


def drawn_mistakes(each: int) -> tuple[float, float]:
    """Of drawn pictures, all of them right: percent failed, percent taken for another style."""
    from understudy_demo import quality
    from understudy_demo.styles import STYLES, draw_wish

    failed = confused = 0
    for number, style in enumerate(STYLES):
        wishes = quality.sample_wishes(each, 1_000 + number)
        pictures = [draw_wish(wish, style, 31_000 + i) for i, wish in enumerate(wishes)]
        judged = quality.judge(pictures, wishes, style)
        failed += sum(bool(one.faults) for one in judged)
        confused += sum(one.looks_like != style for one in judged)
    return 100 * failed / (each * len(STYLES)), 100 * confused / (each * len(STYLES))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a few pictures each, for tests")
    parser.add_argument("--prompts", type=int, default=100, help="for the base")
    options = parser.parse_args(arguments)
    prompts, each = (4, 1) if options.quick else (options.prompts, _WISHES_EACH)
    found = measure(prompts, each)
    failed, confused = drawn_mistakes(each)
    say(f"drawn pictures, all of them right: {failed:.1f} % failed, {confused:.1f} % taken for another style")
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
