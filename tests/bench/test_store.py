"""The results folder: whole files or none, nothing lost in silence, nobody else's folder touched."""

import json
import subprocess
import sys

import pytest

from gradwise.bench.store import Store, write_json
from gradwise.core.errors import UserError

MANIFEST = {"task": "wine", "budget": {"steps": 300}, "methods": {"sgd": {"lr": "log-uniform"}}}


def filled(folder, said=None):
    with Store(folder, MANIFEST, (said if said is not None else []).append) as store:
        for number in range(3):
            store.put("sgd", f"tuning-{number}", {"validation": 0.1 * number, "hyper": {"lr": 1 / 3}})
    return folder


def reopened(folder, manifest=MANIFEST):
    said = []
    with Store(folder, manifest, said.append) as store:
        return store, said


def test_what_was_put_is_there_again_to_the_bit(tmp_path):
    store, said = reopened(filled(tmp_path / "out"))
    assert len(store) == 3
    assert store.get("sgd", "tuning-2") == {"validation": 0.1 * 2, "hyper": {"lr": 1 / 3}}
    assert store.get("sgd", "tuning-3") is None
    assert not said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": "digits"}, "task is 'wine' there and 'digits' here"),
        ({"budget": {"steps": 200}}, "budget.steps is 300 there and 200 here"),
        ({"methods": {"sgd": {"lr": "log-uniform"}, "lion": {}}}, "methods.lion is only here"),
        ({"methods": {}}, "methods.sgd is only there"),
    ],
)
def test_a_folder_of_another_comparison_is_refused_and_left_alone(tmp_path, change, expected):
    folder = filled(tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with pytest.raises(UserError, match="--out") as caught:
        reopened(folder, MANIFEST | change)
    assert expected in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    assert len(reopened(folder)[0]) == 3


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "not json", "binary", "of another trial", "a list"])
def test_a_corrupt_file_is_said_kept_aside_and_measured_again(tmp_path, damage):
    folder = filled(tmp_path / "out")
    victim = folder / "trials" / "sgd" / "tuning-1.json"
    whole = victim.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2], "changed": whole.replace(b"0.1", b"0.9"), "empty": b"", "not json": b"{",
        "binary": b"\xff\xfe\x00",
        "of another trial": (folder / "trials" / "sgd" / "tuning-2.json").read_bytes(), "a list": b"[1]",
    }[damage]  # fmt: skip
    victim.write_bytes(damaged)
    store, said = reopened(folder)
    assert store.get("sgd", "tuning-1") is None
    assert len(store) == 2
    assert len(said) == 1
    assert "tuning-1.json is corrupt or truncated" in said[0]
    assert (folder / "corrupt" / "trials-sgd-tuning-1.json").read_bytes() == damaged
    victim.write_bytes(damaged)
    reopened(folder)
    assert (folder / "corrupt" / "trials-sgd-tuning-1.json.1").read_bytes() == damaged


def test_a_corrupt_manifest_is_kept_aside_and_the_trials_still_know_their_own(tmp_path):
    folder = filled(tmp_path / "out")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:-40])
    with pytest.raises(UserError, match="of another comparison"):
        reopened(folder, MANIFEST | {"task": "digits"})
    store, _ = reopened(folder)
    assert len(store) == 3
    assert (folder / "corrupt" / "manifest.json").exists()


def test_what_a_kill_left_half_written_is_no_trial(tmp_path):
    folder = filled(tmp_path / "out")
    (folder / "trials" / "sgd" / "tuning-3.json.partial").write_text('{"trial"')
    store, said = reopened(folder)
    assert len(store) == 3
    assert not said
    assert not list(folder.rglob("*.partial"))


def test_a_folder_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    (tmp_path / "precious.partial").write_text("a download")
    with pytest.raises(UserError, match=r"a manifest\.json that is not gradwise's"):
        reopened(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"name": "a web app"}
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json of unknown origin"):
        reopened(tmp_path)
    assert (tmp_path / "precious.partial").exists()


def test_a_file_in_the_place_of_the_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match=r"--out: .* cannot be used"):
        reopened(tmp_path / "out")


def test_a_disk_that_takes_no_more_is_a_users_mistake(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    with Store(tmp_path / "out", MANIFEST) as store:
        monkeypatch.setattr("gradwise.bench.store.write_json", full)
        with pytest.raises(UserError, match=r"--out: cannot write .*seed-0\.json: No space left on device"):
            store.put("adamw", "seed-0", {"test": 0.5})
        assert store.get("adamw", "seed-0") is None


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "out"
    code = "import time; from gradwise.bench.store import Store\n"
    code += f"with Store({str(folder)!r}, {MANIFEST!r}): print('open', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(UserError, match="is being written by another gradwise compare"):
        reopened(folder)
    holder.kill()
    holder.communicate()
    assert len(reopened(folder)[0]) == 0


def test_numbers_that_are_not_finite_never_reach_a_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
