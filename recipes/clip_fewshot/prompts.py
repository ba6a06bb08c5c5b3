"""The text tower's input: the classes' names, the templates around them, and a check of their length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from recipes.clip_fewshot.sources import Source


def class_names(source: Source, words: Mapping[str, str] | None) -> list[str]:
    """Return the words for each class.

    Args:
        source: data with the classes and their own names.
        words: other names for some classes, by the data's own names.

    Raises:
        MisconfigurationException: ``words`` names an unknown class, or two classes get the same name.
    """
    given = words or {}
    unknown = [name for name in given if name not in source.classes]
    if unknown:
        raise MisconfigurationException(
            f"class_names has names for {unknown}, but the classes of {source.name} are {list(source.classes)}"
        )
    names = [given.get(folder, name) for folder, name in zip(source.classes, source.names, strict=True)]
    times = Counter(name.lower() for name in names)
    twice = [name for name in names if times[name.lower()] > 1]
    if twice and source.name != "imagenet":  # which has two classes called "missile"
        raise MisconfigurationException(
            f"{source.name}: several classes are called {', '.join(twice)}, and text can't tell them apart: give other "
            "names in class_names"
        )
    return names


def prompts(names: Sequence[str], given: str | list[str]) -> list[list[str]]:
    """Return each class's texts, one per template.

    Args:
        names: names of the classes.
        given: the template, or several.

    Raises:
        MisconfigurationException: a template without exactly one {} for the name, or no template.

    Example:
        >>> prompts(["cat", "dog"], ["a {}.", "the {}."])
        [['a cat.', 'the cat.'], ['a dog.', 'the dog.']]
    """
    templates = [given] if isinstance(given, str) else given
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise MisconfigurationException(
            f"templates must be texts with one {{}} for the class's name, got {templates!r}"
        )
    texts = []
    for name in names:
        texts.append([template.replace("{}", name) for template in templates])
    return texts


def tokenize(texts: Sequence[str], tokenizer: Any, context_length: int) -> Tensor:
    """Return token ids (texts, context_length); open_clip's tokenizers would silently cut what is longer.

    Raises:
        MisconfigurationException: a text does not fit; the message shows it.
    """
    tokens = tokenizer(texts, context_length=context_length)
    # With room for one more token a text that was cut is longer: by a word in place of its end, or by one token.
    longer = tokenizer([*texts, ""], context_length=context_length + 1)
    padding = longer[-1, -1]
    is_cut = (tokens != longer[:-1, :-1]).any(dim=1) | (longer[:-1, -1] != padding)
    if is_cut.any():
        raise MisconfigurationException(
            f"{int(is_cut.sum())} text(s) are longer than the model's {context_length} tokens, the first: "
            f"{texts[int(is_cut.int().argmax())]!r}. Shorten the template or the class's name (class_names)"
        )
    return cast("Tensor", tokens)
