import joblib
import pytest
import torch
from accelerate.state import AcceleratorState
from pipeline import RECIPE, TINY, launch, one_line

import prism_hf
from prism_hf.errors import OutputError
from prism_hf.run.context import make_accelerator
from prism_hf.run.threads import check_threads, default_threads, recorded_threads, use_threads
from prism_hf.runtime import read_json


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(True)


def test_all_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    cores = joblib.cpu_count()
    assert default_threads() == cores
    for processes in (2, 3, 1000):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_threads() == max(1, cores // processes)


def test_the_first_launch_records_its_number_and_later_ones_use_it(tmp_path):
    accelerator = make_accelerator()
    assert recorded_threads(tmp_path / "work") is None
    assert use_threads(accelerator, tmp_path / "work", None) == default_threads() == torch.get_num_threads()
    other = tmp_path / "other" / "work"
    assert use_threads(accelerator, other, 3) == 3 == torch.get_num_threads()
    torch.set_num_threads(1)
    assert use_threads(accelerator, other, None) == 3 == torch.get_num_threads() == recorded_threads(other)


def test_another_number_is_refused(tmp_path):
    use_threads(make_accelerator(), tmp_path / "work", 2)
    check_threads(tmp_path / "work", 2)
    check_threads(tmp_path / "work", None)
    with pytest.raises(OutputError) as error:
        check_threads(tmp_path / "work", 1)
    assert "--threads is 1, but the run in" in one_line(error)
    assert "was started with 2 threads per process" in one_line(error)


def test_a_run_keeps_its_number_of_threads_and_reports_it(tmp_path, capsys):
    words = (*TINY, "--output", tmp_path / "run", "--stage", "squeeze")
    record = tmp_path / "run" / "work" / "threads.json"
    assert launch(*words, "--threads", "1") == 0
    assert read_json(record) == {"threads": 1}
    record.write_text('{"threads": 2}')  # as if it had been started with two
    assert launch(*words) == 0
    assert torch.get_num_threads() == 2
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert log.count("1 process with 1 thread each") == log.count("1 process with 2 threads each") == 1
    assert launch(*words, "--threads", "1") == 2
    assert "was started with 2 threads" in capsys.readouterr().err
    # A fresh start is another run.
    torch.set_num_threads(1)
    assert launch(*words, "--threads", "1", "--fresh", "--teachers", tmp_path / "teachers") == 0
    assert read_json(record) == {"threads": 1}


def test_python_refuses_another_number_before_anything_is_written(tmp_path):
    work = tmp_path / "run" / "work"
    use_threads(make_accelerator(), work, 2)
    (tmp_path / "run" / "recipe.yaml").write_text(prism_hf.recipe.dump_recipe(prism_hf.load_recipe(RECIPE, TINY)))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="--threads is 4, but the run"):
        prism_hf.distill(RECIPE, tmp_path / "run", TINY, threads=4)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
