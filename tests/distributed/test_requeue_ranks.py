"""A signal to any rank ends all of them at one step, saved; the run that comes back ends as one that nobody ended."""

import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers import same
from launch import Results, launch

STRATEGIES = ("ddp", "fsdp2")
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "first rank": {"send": (0, "on_train_batch_start", 3)},
    "other rank between the average and the optimizer": {"send": (1, "on_before_optimizer_step", 9)},
    "last batch": {"send": (1, "on_after_backward", 6)},
    "validation": {"send": (1, "on_validation_batch_start", 2)},
}
UNEVEN: dict[str, dict[str, Any]] = {
    "uneven": {"sizes": (3, 2), "send": (0, "on_validation_batch_start", 3)},
    "uneven whole": {"sizes": (3, 2)},
}
STEP_OF_END = {"first rank": 3, "other rank between the average and the optimizer": 9, "uneven": 6}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("requeue")
    runs = {f"{strategy} {name}": (strategy, RUNS[name]) for strategy, name in product(STRATEGIES, RUNS)}
    runs |= {f"ddp {name}": ("ddp", UNEVEN[name]) for name in UNEVEN}
    arguments = {}
    for name, (strategy, settings) in runs.items():
        place = folder / name
        place.mkdir()
        scontrol = place / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{place}/calls"\n')
        scontrol.chmod(0o755)
        arguments[name] = ("requeue_runs:train", {"folder": str(place), "strategy": strategy, **settings})
    return folder, launch(folder, arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "whole"])
def test_all_ranks_end_at_one_step_and_come_back(results: tuple[Path, Results], strategy: str, name: str) -> None:
    """Bit for bit, with each batch and validation once, and requeued by one rank."""
    assert_comes_back(results, f"{strategy} {name}", f"{strategy} whole", STEP_OF_END.get(name, 6))


def test_ranks_that_validate_unequally_end_after_the_validation(results: tuple[Path, Results]) -> None:
    """They could not agree in each batch."""
    assert_comes_back(results, "ddp uneven", "ddp uneven whole", 6)


def assert_comes_back(results: tuple[Path, Results], name: str, whole: str, step: int) -> None:
    folder, runs = results
    codes = []
    for rank, (ended, expected) in enumerate(zip(runs[name], runs[whole], strict=True)):
        ((code, at),) = ended.pop("ends")
        codes.append(code)
        assert at == step
        assert expected.pop("ends") == []
        assert same(ended, expected), rank
    assert sorted(codes) == [128 + signal.SIGUSR1, 128 + signal.SIGTERM]
    assert (folder / name / "calls").read_text() == "requeue 77\n"
