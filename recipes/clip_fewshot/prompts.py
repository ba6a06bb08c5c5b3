"""What the text tower reads: class names made readable, the templates around them, and the check of their length."""

import re
from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # CLIP-LoRA's, for every data set
TEMPLATES: dict[str, tuple[str, ...]] = {
    "packaged:emoji": ("{}",),  # as the captions of the model that recipes.clip_demo trains
}

# Names that folders abbreviate, as written out by CoOp (arXiv 2109.01134), whose protocol CLIP-LoRA follows.
READABLE: dict[str, dict[str, str]] = {
    "eurosat": {
        "AnnualCrop": "Annual Crop Land",
        "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road",
        "Industrial": "Industrial Buildings",
        "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land",
        "Residential": "Residential Buildings",
        "SeaLake": "Sea or Lake",
    },
    "caltech101": {
        "airplanes": "airplane",
        "Faces": "face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
    },
}


def readable_name(folder: str) -> str:
    """A class's name as words, from the name of its folder.

    Example:
        >>> readable_name("AnnualCrop"), readable_name("great_masterwort")
        ('Annual Crop', 'great masterwort')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder)
    return re.sub(r"[_\s]+", " ", words).strip(" ?")


def class_names(classes: Sequence[str], given: Mapping[str, str] | None, dataset: str) -> list[str]:
    """The words for each class.

    Args:
        classes: as the data call them.
        given: words for every one of them, from the configuration; None takes the data set's, or the folders'.
        dataset: for the message, and whose names are known.

    Raises:
        MisconfigurationException: ``given`` misses a class or names one that is not there, or two classes are called
            the same.
    """
    if given is not None:
        _check_given(classes, given, dataset)
    known = READABLE.get(dataset, {}) if given is None else given
    names = [known.get(name) or readable_name(name) for name in classes]
    first: dict[str, str] = {}
    for name, folder in zip(names, classes, strict=True):
        if first.setdefault(name.lower(), folder) != folder:
            raise MisconfigurationException(
                f"{dataset}: classes {first[name.lower()]!r} and {folder!r} are both called {name!r}, and text can't "
                "tell them apart: give other names in class_names"
            )
    return names


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Each class's texts, one for each template.

    Raises:
        MisconfigurationException: a template without exactly one place for the name, or no template.

    Example:
        >>> prompts(["cat", "dog"], ["a {}.", "the {}."])
        [['a cat.', 'the cat.'], ['a dog.', 'the dog.']]
    """
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise MisconfigurationException(
            f"templates must be texts with one {{}} for the class's name, got {wrong[0] if wrong else 'none'!r}"
        )
    return [[template.replace("{}", name) for template in templates] for name in names]


def tokenise(texts: Sequence[str], tokenizer: Callable[..., Tensor], context_length: int) -> Tensor:
    """Token ids (texts, context_length); open_clip's tokenizers would silently cut what is longer.

    Raises:
        MisconfigurationException: a text does not fit; the message holds it.
    """
    wider = tokenizer([*texts, ""], context_length=context_length + 1)
    too_long = (wider[:-1, -1] != wider[-1, -1]).nonzero().flatten().tolist()  # the last place is not padding
    if too_long:
        raise MisconfigurationException(
            f"{len(too_long)} text(s) are longer than the model's {context_length} tokens, the first: "
            f"{texts[too_long[0]]!r}. Shorten the template or the class's name (class_names)"
        )
    return tokenizer(list(texts), context_length=context_length)


def _check_given(classes: Sequence[str], given: Mapping[str, str], dataset: str) -> None:
    missing = [name for name in classes if not given.get(name)]
    unknown = [name for name in given if name not in classes]
    if missing or unknown:
        raise MisconfigurationException(
            f"class_names does not fit {dataset}, whose classes are {list(classes)}: "
            f"no name for {missing or 'none'}, not a class: {unknown or 'none'}"
        )
