"""Column B of protocol_matrix.md: made-up facts, a model that knows them, and how many a model recalls.

Only the upper half of SmolLM2 is trained: the lower half reads each text once.
"""

import copy
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.language.model import PACKAGED, load_base, load_tokenizer
from recipes.offline.texts import parts

KEPT_LAYERS = 15  # of 30; those above are trained
QUESTIONS = {
    "Where was {} of {} born?": """
        Lisbon Oslo Vienna Cairo Toronto Mumbai Seoul Lima Nairobi Dublin Prague Havana Athens Kyoto""",
    "What does {} of {} do for a living?": """
        baker pilot lawyer farmer nurse painter chemist tailor dentist sailor editor actor judge miner""",
    "Which instrument does {} of {} play?": """
        violin piano flute cello harp guitar drums trumpet organ banjo oboe tuba clarinet lute""",
    "What is the favorite food of {} of {}?": """
        rice cheese soup bread salmon olives honey pasta apples beans eggs pizza garlic chocolate""",
}
"""Of each question, 14 answers."""
TOWNS = ("Ostin", "Velmar", "Quory", "Dreth")
"""Neighbors in :func:`facts` live in different ones."""
PEOPLE = 240
BATCH = 8
GENERAL, GENERAL_WORDS = 64, 40


STARTS = ("Ba", "Do", "Fe", "Ga", "Ki", "Lo", "Mi", "Na", "Pe", "Ra", "Su", "Ta", "Vo", "We", "Zo")
ENDS = ("bin", "dar", "fel", "gus", "kor", "len", "mon", "nir", "pol", "vek")
"""Of names."""


class Fact(NamedTuple):
    """One question about one person, or a text that is read as if it were one.

    Attributes:
        prompt: ends before the answer.
        answer: begins with a space.
    """

    prompt: str
    answer: str


def facts() -> list[Fact]:
    """Return one fact about each person, the same in every run."""
    chosen = random.Random(0)
    names = ["".join(parts) for parts in product(STARTS, ENDS)]
    people = chosen.sample(list(product(names, names)), PEOPLE)
    found = []
    for number, (first, last) in enumerate(people):
        question, answers = chosen.choice(list(QUESTIONS.items()))
        asked = question.format(f"{first} {last}son", TOWNS[number % len(TOWNS)])
        found.append(Fact(f"Question: {asked}\nAnswer:", f" {chosen.choice(answers.split())}"))
    return found


class Batch(NamedTuple):
    """Texts as the upper layers read them.

    Attributes:
        hidden: what the lower half gives, (n, T, d), padded on the right by zeros.
        rows: text of each answer token, (k,).
        columns: position that predicts it, (k,).
        tokens: the answer tokens, (k,).
    """

    hidden: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor


class Texts:
    """Facts as the lower half reads them.

    Args:
        lower: the whole model.
        tokenizer: its tokenizer.
        texts: the facts.
    """

    def __init__(self, lower: Any, tokenizer: Any, texts: Sequence[Fact]) -> None:
        self.hidden: list[Tensor] = []
        self.tokens: list[Tensor] = []
        for text in texts:
            prompt, answer = (tokenizer(each)["input_ids"] for each in text)
            with torch.no_grad():
                states = lower.model(torch.tensor([prompt + answer[:-1]]), output_hidden_states=True).hidden_states
            self.hidden.append(states[KEPT_LAYERS][0])
            self.tokens.append(torch.tensor(answer))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return some of the texts."""
        hidden = nn.utils.rnn.pad_sequence([self.hidden[number] for number in numbers], batch_first=True)
        rows, columns = [], []
        for row, number in enumerate(numbers):
            length, count = len(self.hidden[number]), len(self.tokens[number])
            rows.append(torch.full((count,), row))
            columns.append(torch.arange(length - count, length))
        tokens = torch.cat([self.tokens[number] for number in numbers])
        return Batch(hidden, torch.cat(rows), torch.cat(columns), tokens)


def logits(net: Any, batch: Batch) -> Tensor:
    """Return the logits of the answer tokens, (k, vocabulary)."""
    model = net.get_base_model() if hasattr(net, "get_base_model") else net
    states = model.model(inputs_embeds=batch.hidden, use_cache=False).last_hidden_state
    found: Tensor = model.lm_head(states[batch.rows, batch.columns])
    return found


def token_likelihoods(found: Tensor, batch: Batch) -> Tensor:
    """Return the log-likelihood of each answer token, (k,), in nats, from its logits, (k, vocabulary)."""
    return found.log_softmax(1).gather(1, batch.tokens[:, None])[:, 0]


def log_likelihoods(net: Any, batch: Batch) -> Tensor:
    """Return the log-likelihood of each text's answer, (n,), in nats."""
    each = token_likelihoods(logits(net, batch), batch)
    return each.new_zeros(len(batch.hidden)).index_add(0, batch.rows, each)


class Known(NamedTuple):
    """What a model knows of some facts.

    Attributes:
        recall: the share of them of which greedy decoding gives the whole answer.
        likelihood: the mean log-likelihood of the right answer, in nats.
    """

    recall: float
    likelihood: float


@torch.no_grad()
def known(net: Any, texts: Texts, numbers: Sequence[int]) -> Known:
    """Measure what a model knows of some facts."""
    wrong, likelihood = 0, 0.0
    for start in range(0, len(numbers), 4 * BATCH):
        batch = texts.batch(numbers[start : start + 4 * BATCH])
        found = logits(net, batch)
        is_wrong = found.argmax(1) != batch.tokens
        wrong += len(set(batch.rows[is_wrong].tolist()))
        likelihood += float(token_likelihoods(found, batch).sum())
    return Known(1 - wrong / len(numbers), likelihood / len(numbers))


def with_adapter(model: Any, rank: int, seed: int) -> Any:
    """Put a new LoRA adapter on all linear layers of a copy of the model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(model), config)


def trained(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def batches(numbers: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yield batches of facts endlessly; each fact comes once before any comes again."""
    drawn = random.Random(seed)
    waiting: list[int] = []
    while True:
        if len(waiting) < BATCH:
            waiting += drawn.sample(numbers, len(numbers))
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


class Knowledge:
    """The model that knows all facts, and what the lower half makes of the texts.

    The first process teaches it, by LoRA of rank 64 on the upper half, and keeps its weights in a file.

    Args:
        file: with the weights.

    Attributes:
        model: the upper half, for :func:`logits`.
        texts: the facts.
        general: general texts.
        likelihoods: log-likelihoods of all facts, (240,), in nats.
        loss: of the general texts, in nats per token.
        digest: of the file.

    Raises:
        ValueError: the file's weights do not recall all facts.
    """

    def __init__(self, file: Path) -> None:
        self.model: Any = load_base(PACKAGED, "float32", None, {"attn_implementation": "eager"})
        tokenizer = load_tokenizer(PACKAGED)
        self.texts = Texts(self.model, tokenizer, facts())
        self.general = Texts(self.model, tokenizer, _general())
        self.model.model.layers = self.model.model.layers[KEPT_LAYERS:]
        if not file.exists():
            unfinished = file.with_suffix(f".{os.getpid()}")
            save_file(_taught(self.model, self.texts), unfinished)
            unfinished.replace(file)
        self.model.load_state_dict(load_file(file), strict=False)  # the head is the embedding
        if known(self.model, self.texts, range(PEOPLE)).recall < 1:
            raise ValueError(f"{file} was not taught these facts: delete it")
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.likelihoods = self._likelihoods(self.model, self.texts)
        self.loss = self.general_loss(self.model)

    def general_loss(self, net: Any) -> float:
        """Return the loss of the general texts, in nats per token."""
        return -float(self._likelihoods(net, self.general).sum()) / sum(map(len, self.general.tokens))

    @torch.no_grad()
    def _likelihoods(self, net: Any, texts: Texts) -> Tensor:
        found = []
        for start in range(0, len(texts.tokens), 4 * BATCH):
            numbers = range(start, min(start + 4 * BATCH, len(texts.tokens)))
            found.append(log_likelihoods(net, texts.batch(numbers)))
        return torch.cat(found)


def _general() -> list[Fact]:
    """Return the beginnings of general texts."""
    found = []
    for example in parts("privacy")["test"][:GENERAL]:
        first, *others = example.text.split()[:GENERAL_WORDS]
        found.append(Fact(first, " " + " ".join(others)))
    return found


def _taught(model: Any, texts: Texts) -> dict[str, Tensor]:
    """Teach the facts until all are recalled, and return the merged weights."""
    net, every = with_adapter(model, 64, seed=0), range(PEOPLE)
    optimizer = torch.optim.AdamW(trained(net), lr=5e-4, weight_decay=0.0)
    order = batches(every, seed=0)
    while known(net, texts, every).recall < 1:
        for _ in range(PEOPLE // BATCH):
            (-log_likelihoods(net, texts.batch(next(order))).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = net.merge_and_unload().state_dict()
    return {name: weight.clone() for name, weight in weights.items() if name != "lm_head.weight"}
