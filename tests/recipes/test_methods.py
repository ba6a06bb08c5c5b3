"""The one table of methods: names that rows of results hold, and defaults that suffice."""

from lightning_flatlora import EFMLoRA, FMLoRA
from recipes.benchmarks.methods import METHODS as MEASURED
from recipes.clip_fewshot import sweep
from recipes.shared.methods import BY_TITLE, COLOURS, METHODS, OURS


def test_settings_replace_the_defaults() -> None:
    (efmlora,) = BY_TITLE["EFMLoRA"].callbacks(rho=0.7, sigma=1.0)
    (fmlora,) = BY_TITLE["FMLoRA"].callbacks(rho=0.7)
    assert type(efmlora) is EFMLoRA
    assert type(fmlora) is FMLoRA
    assert efmlora.rho(0) == fmlora.rho(0) == 0.7
    assert METHODS["efmlora"].callbacks()[0].rho(0) == 0.5  # type: ignore[attr-defined]


def test_titles_are_unique_and_every_program_finds_its_methods() -> None:
    assert len(BY_TITLE) == len(METHODS)
    assert set(sweep.METHODS) <= set(METHODS)
    assert set(OURS) <= set(BY_TITLE) & set(MEASURED) & set(COLOURS)
