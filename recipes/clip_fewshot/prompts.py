"""What the text tower reads: class names made readable, the templates around them, and the check of their length."""

import re
from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from recipes.clip.model import too_long

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # CLIP-LoRA's, for every data set
COOP_TEMPLATES = {
    "caltech101": "a photo of a {}.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "flowers102": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "imagenet": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": "a photo of a {}.",
    "sun397": "a photo of a {}.",
    "ucf101": "a photo of a person doing {}.",
}
"""CoOp's own prompt for each of its data sets, by hand (arXiv 2109.01134)."""

Templates = str | list[str] | None

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


def templates_of(dataset: str, given: Templates) -> Sequence[str]:
    """The texts around a class's name.

    Args:
        dataset: whose classes they are.
        given: the text or texts; "coop" for CoOp's own of this data set; None for CLIP-LoRA's, which is one for all.

    Raises:
        MisconfigurationException: CoOp has none for this data set.
    """
    if given is None:
        return DEFAULT_TEMPLATES
    if given != "coop":
        return [given] if isinstance(given, str) else given
    if dataset not in COOP_TEMPLATES:
        raise MisconfigurationException(
            f"templates='coop' is for the data sets {', '.join(COOP_TEMPLATES)}, got dataset={dataset!r}: give the "
            "texts themselves"
        )
    return [COOP_TEMPLATES[dataset]]


def class_names(
    classes: Sequence[str], words: Mapping[str, str] | None, dataset: str, names: Sequence[str] | None = None
) -> list[str]:
    """The words for each class.

    Args:
        classes: as the data call them.
        words: words for every one of them, from the configuration; None takes the data set's, or the folders'.
        dataset: for the message, and whose names are known.
        names: words that come with the data, taken as they are: two classes of ImageNet are both called "missile".

    Raises:
        MisconfigurationException: ``words`` misses a class or names one that is not there, or two classes are called
            the same.
    """
    if words is None and names is not None:
        return list(names)
    if words is not None:
        _check_words(classes, words, dataset)
    known = READABLE.get(dataset, {}) if words is None else words
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
    texts = []
    for name in names:
        texts.append([template.replace("{}", name) for template in templates])
    return texts


def tokenize(texts: Sequence[str], tokenizer: Callable[..., Tensor], context_length: int) -> Tensor:
    """Token ids (texts, context_length); open_clip's tokenizers would silently cut what is longer.

    Raises:
        MisconfigurationException: a text does not fit; the message holds it.
    """
    overlong = too_long(texts, tokenizer, context_length)
    if overlong:
        raise MisconfigurationException(
            f"{len(overlong)} text(s) are longer than the model's {context_length} tokens, the first: "
            f"{overlong[0]!r}. Shorten the template or the class's name (class_names)"
        )
    return tokenizer(list(texts), context_length=context_length)


def _check_words(classes: Sequence[str], words: Mapping[str, str], dataset: str) -> None:
    missing = [name for name in classes if not words.get(name)]
    unknown = [name for name in words if name not in classes]
    if missing or unknown:
        raise MisconfigurationException(
            f"class_names does not fit {dataset}, whose classes are {list(classes)}: "
            f"no name for {missing or 'none'}, not a class: {unknown or 'none'}"
        )
