"""The tables of the paper whose models see images: few images of each class, and questions about images."""

from itertools import product

from recipes.reproduce.table import USUAL_GRIDS, Metric, Published, Table, Task

_IMAGES = {
    "eurosat": "EuroSAT",
    "oxford_pets": "Pets",
    "flowers102": "Flowers",
    "caltech101": "Caltech",
    "dtd": "DTD",
}
_SHOTS = (1, 4, 16)
# Accuracy in % with each of these numbers of images.
_CLIP_LORA = {
    "eurosat": "72.3 84.9 92.1",
    "oxford_pets": "92.3 91.0 92.4",
    "flowers102": "83.2 93.7 98.0",
    "caltech101": "93.7 95.2 96.4",
    "dtd": "54.3 63.8 72.0",
}


def _few_images(dataset: str, shots: int) -> Task:
    return Task(
        f"{_IMAGES[dataset]} {shots}",
        ("clip_lora.yaml",),
        500 * shots,
        ("OpenAI's ViT-B/16 (open_clip)", f"{_IMAGES[dataset]} and its split_zhou file (CoOp's DATASETS.md)"),
        2e-4,
        options=(f"--data.dataset={dataset}", f"--data.shots={shots}"),
        metrics=(Metric("accuracy"),),
    )


_FEW_IMAGES = {f"{name}_{shots}": _few_images(name, shots) for name, shots in product(_IMAGES, _SHOTS)}


def _published() -> Published:
    values = {}
    for dataset, of_shots in _CLIP_LORA.items():
        for shots, value in zip(_SHOTS, of_shots.split(), strict=True):
            values[f"{dataset}_{shots}"] = value
    source = "Zanella and Ben Ayed, arXiv 2405.18541: ViT-B/16, accuracy in %, mean over 3 seeds, CoOp's parts"
    return Published("CLIP-LoRA", source, values)


TABLE4 = Table(
    name="table4",
    title="Table 4: CLIP ViT-B/16, 1, 4 and 16 images of each class",
    recipe="clip_fewshot",
    tasks=_FEW_IMAGES,
    learning_rates=(1e-4, 2e-4, 4e-4),
    grids={"lora_dropout": (0.25, 0.0, 0.1, 0.5), **USUAL_GRIDS, "rho": (0.0, 0.01, 0.03, 0.1)},
    seeds=(1, 2, 3),
    seed_options=("seed_everything", "data.seed"),
    choice="accuracy",
    keeps="last",
    precision="recipe",
    published=(_published(),),
    notes=(
        "CLIP-LoRA has one learning rate for all sets and takes the last weights, without validation. Here settings "
        "are chosen by as many validation images of each class as there are shots, 4 at most.",
    ),
)


def _questions(name: str, title: str, metric: str, steps: int, rho: float, data: str) -> Task:
    return Task(
        title,
        (f"{name}.yaml",),
        steps,
        ("Qwen/Qwen2.5-VL-7B-Instruct", data),
        2e-4,
        rho,
        options=("--model.validation_answers=0",),  # the loss chooses, and to write answers takes long
        metrics=(Metric(metric),),
    )


_FROZEN, _TRAINED = ("86.8", "68.5"), ("84.0", "68.9")
_QUESTIONS = {
    "scienceqa": _questions("scienceqa", "ScienceQA", "exact_match", 147, 0.2, "derek-thomas/ScienceQA"),
    "vizwiz": _questions("vizwiz", "VizWiz", "vqa_accuracy", 459, 0.05, "the files of vizwiz.org, train and val"),
}
TABLE5 = Table(
    name="table5",
    title="Table 5: questions about images, Qwen2.5-VL-7B in place of Qwen-VL-Chat",
    recipe="vqa",
    tasks=_QUESTIONS,
    learning_rates=(1e-4, 2e-4, 4e-4),
    grids={"lora_dropout": (0.05, 0.0, 0.1, 0.2), **USUAL_GRIDS},
    seeds=(0, 1, 2),
    seed_options=("seed_everything", "data.seed"),
    unit="accuracy of ScienceQA's questions with an image in %, VQA score of VizWiz in %",
    choice="loss",
    precision="recipe",
    published=(
        Published(
            "Qwen-VL-Chat, LoRA, connector frozen", "arXiv 2406.05130", dict(zip(_QUESTIONS, _FROZEN, strict=True))
        ),
        Published(
            "Qwen-VL-Chat, LoRA, connector trained", "arXiv 2406.05130", dict(zip(_QUESTIONS, _TRAINED, strict=True))
        ),
        Published(
            "Qwen-VL-Chat, EFMLoRA, the paper's",
            "arXiv 2508.00522",
            {"scienceqa": "1.5 above LoRA", "vizwiz": "1.0 above LoRA"},
        ),
    ),
    notes=(
        "Published figures are of Qwen-VL-Chat, for which transformers has no class. Only differences between methods "
        "can be compared with them.",
    ),
)
