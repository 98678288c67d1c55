"""Repositories of the Hub: loading, publishing, the local cache, and what a user reads where something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import egohod
import main_eval
from egohod import cli, hub
from egohod.errors import UserError
from egohod.evaluation.embed import fingerprint
from egohod.evaluation.features import write_json
from egohod.publish import save_weights, write_folder
from egohod.training.checkpoint import open_weights
from tests.hub_server import TOKEN, HubServer, hub_server, variables
from tests.model.field_files import write_open_clip
from tests.support import ROOT, ShortRun, environment
from tools import convert_checkpoint

NAME = "org/model"
VIDEO = torch.linspace(-1, 1, 2 * 3 * 5 * 40 * 40).view(2, 3, 5, 40, 40)


@pytest.fixture(scope="module")
def published(short_run: ShortRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return write_folder(short_run.folder, tmp_path_factory.mktemp("published") / "model", name=NAME)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, cache: Path, published: Path) -> Iterator[HubServer]:
    with hub_server(monkeypatch, cache) as running:
        running.add(NAME, published)
        yield running


def features(*arguments: object) -> torch.Tensor:
    model, _, tokenizer = egohod.create_model_and_transforms(*arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.cat([model.encode_video(VIDEO), model.encode_text(tokenizer(["#C C cuts", "#C C washes"]))])


def test_a_run_becomes_a_folder_that_loads_as_the_run(short_run: ShortRun, published: Path) -> None:
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert {each.name for each in published.iterdir()} == names
    torch.testing.assert_close(features(str(published)), features("DEMO", short_run.folder), rtol=0, atol=0)
    # Whatever is given counts more, and a wrong geometry is still refused.
    assert egohod.create_model_and_transforms(str(published), num_frames=2, adapt=True)[0].num_frames == 2
    with pytest.raises(UserError, match="holds a DEMO, not a DEMO_SMALL"):
        egohod.create_model_and_transforms("DEMO_SMALL", published)
    pixels = json.loads((published / "preprocessor_config.json").read_text())
    assert (pixels["num_frames"], pixels["crop_size"], pixels["image_mean"][2]) == (
        *(5, {"height": 40, "width": 40}, pytest.approx(0.40821073)),
    )
    assert json.loads((published / "config.json").read_text())["model"]["activation"] == "quick_gelu"


def test_the_card_has_data_recipe_results_and_no_path_of_this_machine(
    short_run: ShortRun, tmp_path: Path, published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = short_run.folder
    card = (published / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: egohod\nlicense: other\n")
    assert f'model="hf-hub:{NAME}"' in card
    assert "| demo | `hod.csv` |" in card
    assert "clips in all" in card
    assert "| loss.name | infonce |" in card
    assert "Not measured" in card
    for each in published.iterdir():
        assert str(short_run.folder).encode() not in each.read_bytes()
    number = {"value": 61.0, "unit": "percent", "interval": [55.0, 67.0], "chance": 25.0}
    order = {"value": 60.5, "unit": "percent", "interval": [54.0, 66.0], "drop": 0.5, "drop_interval": [-2.0, 3.0]}
    results = {
        "format": 1,
        "checkpoint": {"path": "moved", "sha256": fingerprint(egohod.create_model_and_transforms(str(run))[0])},
        "config": {"model": "DEMO"},
        "metrics": {"bench/map": 61.0, "bench/map_chance": 25.0, "bench/freeze/map": 60.5},
        "benchmarks": {
            "bench": {
                "metrics": {"map": number | {"controls": {"freeze": order}}},
                "protocol": {"name": "plain", "frames": 5, "size": 40, "windows": 1, "crops": 1},
                **{"clips": 90, "evaluated": 90, "partial": False},
            }
        },
    }
    write_json(tmp_path / "results.json", results)
    card = (write_folder(run, tmp_path / "a", results=tmp_path, licence="mit") / "README.md").read_text()
    assert "mAP 61.0 [55.0, 67.0]" in card
    assert "Not measurably better than with destroyed time: bench/map (freeze)" in card
    assert "license: mit" in card
    assert "60.5%" in card
    # Also where a run was continued after its evaluation.
    for path in ("runs/other", str(run)):
        write_json(tmp_path / "results.json", results | {"checkpoint": {"path": path, "sha256": "0" * 64}})
        with pytest.raises(UserError, match="results of other weights"):
            write_folder(run, tmp_path / "b", results=tmp_path)
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(tmp_path / "results.json", tmp_path / "run")
    assert "Not measured" in (write_folder(tmp_path / "run", tmp_path / "c") / "README.md").read_text()
    assert "the card has none" in caplog.text
    with pytest.raises(UserError, match="is not an empty folder"):
        write_folder(run, tmp_path / "a")
    with pytest.raises(UserError, match=r"licence='mit\\ntags: x': give an identifier"):
        write_folder(run, tmp_path / "d", licence="mit\ntags: x")
    assert not (tmp_path / "d").exists()
    # The name of a folder is data, too.
    card = (write_folder(run, tmp_path / 'a"b\n# c') / "README.md").read_text()
    assert '\n# a"b # c\n' in card
    assert r'model="a\"b # c")' in card


def test_a_repository_is_downloaded_once_and_then_read_from_the_cache(
    server: HubServer, published: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = features(str(published))
    torch.testing.assert_close(features(f"hf-hub:{NAME}"), expected, rtol=0, atol=0)
    model = egohod.create_model("DEMO", num_frames=5, activation="quick_gelu")
    assert egohod.load_weights(model, f"hf-hub:{NAME}").source == f"hf-hub:{NAME}"
    assert server.downloads("model.safetensors") == 1
    assert server.downloads("README.md") == 0, "nobody reads it here"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(features(f"hf-hub:{NAME}"), expected, rtol=0, atol=0)
    assert not caplog.records
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.answers[NAME] = (503, "")
    torch.testing.assert_close(features(f"hf-hub:{NAME}"), expected, rtol=0, atol=0)
    assert "the Hub answered 503; the copy in the local cache is used" in caplog.text


def test_a_revision_is_chosen_behind_the_name(server: HubServer, short_run: ShortRun, tmp_path: Path) -> None:
    content = open_weights(short_run.folder)
    content.tensors["logit_scale"] = torch.tensor(3.0)
    other = tmp_path / "other"
    other.mkdir()
    save_weights(content, other / "model.safetensors")
    server.add(NAME, other, revision="v2")
    scales = [open_weights(f"hf-hub:{NAME}{each}").tensors["logit_scale"].item() for each in ("", "@main", "@v2")]
    assert scales[0] == scales[1] != scales[2] == 3.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "there is no such repository, or it is private: check the name, or log in"),
        ("org/gated", "the repository is gated: accept its conditions on its page, then log in"),
        ("org/forbidden", r"the Hub refuses access \(403\): the token is missing, wrong or has no permission"),
        ("org/broken", r"the Hub answered 500; and there is no complete copy in the local cache"),
        (f"{NAME}@v9", "the repository has no revision 'v9'"),
        ("org/pickles", r"holds no safetensors but the pickle pytorch_model.bin, which could run code and is not"),
        ("org/nothing", "holds no safetensors; ask its owner"),
        ("org/several", r"holds 2 files of weights, none of a usual name; download one of \['a.safetensors"),
        ("org//model", "not the name of a repository, which is hf-hub:org/name or hf-hub:org/name@revision"),
        ("../model", "not the name of a repository"),
        ("", "not the name of a repository"),
        ("org/model.git", "not the name of a repository"),
        ("org/my model", "not the name of a repository"),
    ],
)
def test_what_is_wrong_is_one_line(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    server.repositories |= {"org/gated": server.repositories[NAME], "org/pickles": {"main": {}}}
    server.gated.add("org/gated")
    server.repositories["org/pickles"]["main"] = {"pytorch_model.bin": b"", "config.json": b"{}", "run.py": b""}
    server.repositories["org/nothing"] = {"main": {"README.md": b""}}
    server.repositories["org/several"] = {"main": {"a.safetensors": b"", "b.safetensors": b""}}
    server.answers |= {"org/forbidden": (403, ""), "org/broken": (500, "")}
    with pytest.raises(UserError, match=f"^hf-hub:{name}: {message}") as error:
        egohod.create_model_and_transforms(f"hf-hub:{name}")
    assert "\n" not in str(error.value)
    assert cli.run(convert_checkpoint.main, ["--inspect", f"hf-hub:{name}"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.py"))


def test_without_a_network_and_without_a_copy_it_is_one_line(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE=1, so the Hub is not contacted; .* local cache \({cache}\)$"):
        open_weights(f"hf-hub:{NAME}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.close()
    with pytest.raises(UserError, match=rf"no answer from the Hub \({server.address}\): .* local cache"):
        open_weights(f"hf-hub:{NAME}")
    # A name that does not begin with the prefix asks nobody.
    with pytest.raises(UserError, match="no such file"):
        open_weights(NAME)


def test_an_interrupted_download_is_not_taken_for_the_repository(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    open_weights(f"hf-hub:{NAME}")
    next(cache.rglob("snapshots/*/model.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="there is no complete copy in the local cache"):
        open_weights(f"hf-hub:{NAME}")


def test_models_of_open_clip_load_by_their_repository(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    own = write_open_clip(folder, "CLIP, quick GELU")
    # As the Hub's repositories have them: what is not needed is not fetched.
    for name in ("open_clip_pytorch_model.bin", "model.safetensors", "code.py", "everything.json"):
        (folder / name).write_bytes(b"not to be opened")
    server.add("org/clip", folder)
    model, _, tokenizer = egohod.create_model_and_transforms("hf-hub:org/clip", num_frames=1)
    assert (model.geometry.name, model.activation) == ("open_clip/hf-hub:org/clip", "quick_gelu")
    picture, tokens = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32), tokenizer(["a cup"])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_video(picture[:, :, None]), own.encode_image(picture, normalize=True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            model.encode_text(tokens), own.encode_text(tokens, normalize=True), rtol=0, atol=1e-5
        )
    assert not any(server.downloads(each) for each in ("bin", "/model.safetensors", ".py", "everything.json"))
    server.repositories["org/clip"]["main"].pop("open_clip_config.json")
    with pytest.raises(
        UserError, match=r"hf-hub:org/clip has no open_clip_config.json, so it is no model of open_clip"
    ):
        egohod.create_model("open_clip/hf-hub:org/clip")


def test_a_run_is_published_and_loads_from_where_it_is(
    server: HubServer, short_run: ShortRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = short_run.folder
    with pytest.raises(UserError, match=r"^hf-hub:org/new: the Hub refuses access \(401\)"):
        egohod.push_to_hub(run, "org/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert egohod.push_to_hub(run, "org/new", licence="mit") == f"{server.address}/org/new"
    files = server.repositories["org/new"]["main"]
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= files.keys()
    assert b'model="hf-hub:org/new"' in files["README.md"]
    torch.testing.assert_close(features("hf-hub:org/new"), features("DEMO", run), rtol=0, atol=0)
    assert cli.run(convert_checkpoint.main, [str(run), "--push", "org/new", "--licence", "apache-2.0"]) == 0
    assert b"license: apache-2.0" in files["README.md"]
    assert server.tokens - {f"Bearer {TOKEN}", ""} == set()
    with pytest.raises(UserError, match="is named org/name"):
        egohod.push_to_hub(run, "model")
    # What is private must not become public, and a card that is refused is not a network that is down.
    egohod.push_to_hub(run, "org/secret", private=True)
    egohod.push_to_hub(run, "org/secret", private=True)
    with pytest.raises(UserError, match=r"^hf-hub:org/new: exists and is public, not private; nothing was uploaded$"):
        egohod.push_to_hub(run, "org/new", private=True)
    server.refusal = "license must be one of"
    with pytest.raises(UserError, match=r"^hf-hub:org/new: the Hub refuses the model card: .*license must be one of"):
        egohod.push_to_hub(run, "org/new", licence="mine")
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize("token", [f"{TOKEN}\n with a line", f"{TOKEN}\u00e9"])
def test_no_message_holds_a_token(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], token: str
) -> None:
    # Such a token cannot be sent, and the libraries' own errors quote it.
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", server.address.replace("//", "//user:password@"))
    with pytest.raises(UserError) as error:
        open_weights("hf-hub:org/absent")
    assert cli.run(convert_checkpoint.main, ["--inspect", "hf-hub:org/absent"]) == 2
    with pytest.raises(UserError) as other:
        hub.upload(Path(__file__).parent / "golden", "org/absent")
    text = "".join((*capfd.readouterr(), str(error.value), str(other.value)))
    assert TOKEN not in text
    assert "password" not in text
    # What a traceback would print.
    assert error.value.__cause__ is None or TOKEN not in str(error.value.__cause__)


def test_programs_take_the_name_for_a_checkpoint(
    server: HubServer, demo_world: Path, tmp_path: Path, short_run: ShortRun
) -> None:
    videos = demo_world / "train" / "videos"
    table = (demo_world / "train" / "hod.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(table[:5]) + "\n")
    scores = []
    for checkpoint in (f"hf-hub:{NAME}", str(short_run.folder)):
        command = ["--checkpoint", checkpoint, "--benchmark", "mine", "--metadata", str(tmp_path / "few.csv")]
        command += ["--root", str(videos), "--output", str(tmp_path / "results"), "evaluate.cache=null"]
        command += ["evaluate.benchmarks.mine.kind=custom", "data.workers=0"]
        assert cli.run(main_eval.main, command) == 0
        scores.append(json.loads((tmp_path / "results" / "results.json").read_text())["metrics"])
    assert scores[0] == scores[1]
    # The checksum in them is that of the weights that are published.
    assert (
        "Not measured"
        not in (
            write_folder(short_run.folder, tmp_path / "own", results=tmp_path / "results") / "README.md"
        ).read_text()
    )


@pytest.mark.ci
def test_of_processes_that_start_together_one_downloads(server: HubServer, cache: Path, published: Path) -> None:
    code = f"from egohod.training.checkpoint import open_weights; print(len(open_weights('hf-hub:{NAME}').tensors))"
    inherited = environment(**variables(server, cache))
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=inherited, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    counts = {process.communicate(timeout=300)[0] for process in processes}
    assert counts == {f"{len(open_weights(published).tensors)}\n"}
    assert server.downloads("model.safetensors") == 1
