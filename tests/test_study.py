"""The run folder contract: finished means finished, whatever is killed when."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from branchmerge.errors import UserError
from branchmerge.study import MANIFEST, Manifest, Parent, is_done, locked, place, publish, read_manifest, weights_sha256


def manifest(lr: float = 1e-5) -> Manifest:
    return Manifest("expert", "math", {"optim": {"lr": lr}}, {"optim": {"lr": lr, "betas": (0.9, 0.95)}})


def test_a_published_folder_holds_files_and_manifest(tmp_path: Path) -> None:
    target = tmp_path / "math"
    with publish(target, manifest()) as partial:
        (partial / "model.safetensors").write_bytes(b"weights")
        assert not target.exists()
    found = read_manifest(target)
    assert found is not None
    assert found.weights_sha256 == weights_sha256(target)
    assert found.packages["torch"] and found.created
    assert [path.name for path in tmp_path.iterdir()] == ["math"]


def test_the_fingerprint_is_what_sha256sum_prints(tmp_path: Path) -> None:
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    shell = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert weights_sha256(tmp_path) == shell.stdout.split()[0]


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish(tmp_path / "math", manifest()) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_same_work_is_done_and_other_work_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "math"
    assert not is_done(target, manifest(), overwrite=False)
    with publish(target, manifest()):
        pass
    assert is_done(target, manifest(), overwrite=False)
    with pytest.raises(UserError, match=r"optim\.lr: 1e-05 there, 0\.001 now"):
        is_done(target, manifest(lr=1e-3), overwrite=False)
    assert not is_done(target, manifest(lr=1e-3), overwrite=True)


@pytest.mark.parametrize("within", ["inner", "deep/er/inner"])
def test_no_result_is_made_inside_another(tmp_path: Path, within: str) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "of another program"}')
    outer = tmp_path / "outer"
    assert not is_done(outer, manifest(), overwrite=False)
    with publish(outer, manifest()):
        pass
    with pytest.raises(UserError, match=r"lies inside the result .*outer, and would go with it"):
        is_done(outer / within, manifest(), overwrite=False)


def test_a_link_means_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "here", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    folder = place(str(link))
    with locked(folder), publish(folder, manifest()) as partial:
        (partial / "file").write_text("x")
    assert link.is_symlink() and (link / "file").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_folder_that_cannot_be_made_is_told_before_its_lock() -> None:
    with pytest.raises(UserError, match="/proc/x: cannot write y there"), locked(Path("/proc/x/y")):
        pass


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(UserError, match="/proc: is a mount point"):
        is_done(Path("/proc"), manifest(), overwrite=False)


def test_a_result_whose_weights_are_gone_is_not_done(tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    with publish(folder, manifest()) as partial:
        (partial / "model.safetensors").write_bytes(b"x")
    assert is_done(folder, manifest(), overwrite=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"finished once, but .* or delete it"):
        is_done(folder, manifest(), overwrite=False)


def test_rows_that_changed_are_named(tmp_path: Path) -> None:
    def of_rows(digest: str) -> Manifest:
        return Manifest("expert", "math", {}, {"sources": [{"format": "messages", "sha256": digest}]})

    with publish(tmp_path / "math", of_rows("aaa")):
        pass
    with pytest.raises(UserError, match=r'\(sources\.0\.sha256: "aaa" there, "bbb" now\)'):
        is_done(tmp_path / "math", of_rows("bbb"), overwrite=False)


def test_another_parent_is_other_work(tmp_path: Path) -> None:
    target = tmp_path / "math"
    with publish(target, manifest()):
        pass
    planned = manifest()
    planned.parents = [Parent("elsewhere", "abc")]
    with pytest.raises(UserError, match="parents"):
        is_done(target, planned, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for mine in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="no result of branchmerge"):
            is_done(mine, manifest(), overwrite)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "web app"}', '{"parents": [], "theme": 1}'])
def test_a_manifest_of_somebody_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest of branchmerge"):
        is_done(tmp_path, manifest(), overwrite=True)


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "math"
    for name in ("old", "new"):
        with publish(target, manifest()) as partial:
            (partial / name).write_text(name)
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "new"]


def test_kill_9_leaves_no_folder_that_looks_finished_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "math"
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from branchmerge.study import Manifest, locked, publish
        target = Path(sys.argv[1])
        with locked(target), publish(target, Manifest("expert", "math", {}, {})) as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            print("building", flush=True)
            time.sleep(60)
        """
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline().strip() == "building"
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert read_manifest(target) is None and not target.exists()
    with locked(target), publish(target, manifest()) as partial:
        assert list(partial.iterdir()) == []
    assert read_manifest(target) is not None
    assert [path.name for path in tmp_path.glob(".math.partial*")] == []


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    target = tmp_path / "math"
    program = (
        "import sys; from pathlib import Path; from branchmerge.study import locked\n"
        "with locked(Path(sys.argv[1])): print('in', flush=True)"
    )
    with locked(target):
        second = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting for another process" in second.stdout.readline()
        time.sleep(0.3)
        assert second.poll() is None
    said, _ = second.communicate(timeout=30)
    assert said.strip() == "in" and second.returncode == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux")
def test_a_place_where_no_file_can_be_is_not_waited_for() -> None:
    with pytest.raises(UserError, match="/proc: cannot write result there"), locked(Path("/proc/result"), wait=False):
        pass
