"""A recipe's command line that stops once its arguments are parsed."""

from typing_extensions import override

from recipes.shared.cli import RecipeCLI


class ParsingCLI(RecipeCLI):
    """Parses and makes nothing, which would need models and data."""

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def after_instantiate_classes(self) -> None:
        pass
