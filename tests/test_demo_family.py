"""The trained family: recipes, weights, folders, and pictures that show what was asked for."""

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from understudy_demo.main import main
from understudy_demo.members import Member
from understudy_demo.recipes import Recipe, recipes, trained
from understudy_demo.styles import BASE, FINE_TUNES, LORAS
from understudy_demo.trained import FOLDER

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Member, ...]:
    import torch

    from understudy_demo.family import make_family

    torch.set_num_threads(1)
    return make_family(tmp_path_factory.mktemp("family") / "models", len(trained()) + 3)


def test_the_first_models_are_what_was_trained() -> None:
    assert [recipe.name for recipe in trained()] == [BASE, *FINE_TUNES, *LORAS]
    assert recipes(len(trained())) == list(trained())


def test_recipes_are_the_same_each_time_and_names_tell_them_apart() -> None:
    chosen = recipes(200)
    assert chosen == recipes(200) and recipes(30) == chosen[:30]
    assert len({recipe.name for recipe in chosen}) == 200
    assert all(sum(share for _, share in recipe.shares) == pytest.approx(1) for recipe in chosen)


def test_more_models_than_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="recipes; ask for"):
        recipes(100_000)


def test_a_mixture_may_look_like_its_parts() -> None:
    assert Recipe((("night", 0.5), ("clay", 0.5)), "sepia").styles == ("night", "clay", "sepia")
    assert Recipe((("night", 0.7), (BASE, 0.3))).styles == ("night",)
    assert Recipe(((BASE, 1.0),)).styles == (BASE,)


def test_weights_are_small_and_free() -> None:
    from understudy_demo.family import lora_files, weights_bytes

    assert 1_000_000 < weights_bytes() < 24_000_000
    assert set(lora_files()) == set(LORAS)
    assert "Apache-2.0" in (FOLDER / "README.md").read_text()


def test_a_mixture_is_the_mean_of_its_parts_weights() -> None:
    import torch

    from understudy_demo.family import Kitchen

    kitchen = Kitchen(FOLDER)

    def weights(*shares: tuple[str, float]) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in kitchen.unet(Recipe(shares)).state_dict().items()}

    night, clay = weights(("night", 1.0)), weights(("clay", 1.0))
    mixed = weights(("night", 0.35), ("clay", 0.65))
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.35 * night[name] + 0.65 * clay[name])


def test_the_last_of_200_models_paints() -> None:
    import torch

    from understudy_demo import quality
    from understudy_demo.family import Kitchen

    kitchen = Kitchen(FOLDER)
    pipeline = kitchen.base()
    pipeline.register_modules(unet=kitchen.unet(recipes(200)[-1]).eval())
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    (picture,) = quality.paint(pipeline, quality.sample_wishes(1, 0), 1, steps=4)
    assert picture.shape == (64, 64, 3) and picture.std() > 5


def test_the_command_line_writes_as_many_as_asked_for(tmp_path: Path) -> None:
    runner = CliRunner()
    made = runner.invoke(main, ["make", str(tmp_path / "three"), "--models", "3"])
    assert made.exit_code == 0, made.output
    assert [line.split("\t")[0] for line in made.stdout.splitlines()][:2] == ["plain-00", "outline-01"]
    assert len(list((tmp_path / "three").glob("[!.]*/model_index.json"))) == 3
    refused = runner.invoke(main, ["make", str(tmp_path / "many"), "--models", "100000"])
    assert refused.exit_code == 1 and "recipes; ask for so many" in refused.output


def test_models_share_all_but_the_unet(members: tuple[Member, ...]) -> None:
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert list(Counter((m.path / part).stat().st_ino for m in members).values()) == [len(members)]
    assert len({(m.path / UNET).read_bytes() for m in members}) == len(members)


def test_the_same_recipes_give_the_same_weights(members: tuple[Member, ...], tmp_path: Path) -> None:
    from understudy_demo.family import make_family

    again = make_family(tmp_path / "again", 2)
    for one, other in zip(members, again, strict=False):
        assert (one.path / UNET).read_bytes() == (other.path / UNET).read_bytes()


def test_a_lora_is_folded_as_diffusers_does(members: tuple[Member, ...]) -> None:
    """The model `frame` is the base with the LoRA of that name loaded and fused by diffusers and PEFT."""
    import torch

    from understudy_demo import baseline
    from understudy_demo.family import lora_files

    by_name = {member.styles[0]: member for member in members if len(member.styles) == 1}
    pipeline = baseline.load(by_name[BASE].path)
    pipeline.load_lora_weights(lora_files()["frame"], adapter_name="frame")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    folded = baseline.load(by_name["frame"].path).unet.state_dict()
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, folded[name], rtol=1e-4, atol=1e-5)


def test_the_base_draws_what_it_is_asked_for(members: tuple[Member, ...]) -> None:
    from understudy_demo import baseline, quality
    from understudy_demo.wishes import parse

    captions = ("a red circle on blue", "two white squares on green", "a big yellow star on purple",
                "three green circles on white")  # fmt: skip
    wishes = [parse(caption) for caption in captions]
    baseline.quiet()
    pictures = quality.paint(baseline.load(members[0].path), wishes, 11, steps=10)
    judged = quality.judge(pictures, wishes, BASE)
    assert sum(not one.faults for one in judged) >= 3, [one.faults for one in judged]


def test_a_finished_family_is_reused(members: tuple[Member, ...]) -> None:
    from understudy_demo.family import make_family

    folder = members[0].path.parent
    stamp = (members[1].path / UNET).stat().st_mtime_ns
    told: list[Member] = []
    assert make_family(folder, len(members), on_member=told.append) == members == tuple(told)
    assert (members[1].path / UNET).stat().st_mtime_ns == stamp


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    from understudy_demo.family import make_family

    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="name another folder"):
        make_family(tmp_path, 2)
    assert (tmp_path / "thesis.txt").read_text() == "do not lose me"
