"""From a question about an image to tokens and pixels, through the model's own processor and chat template."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL.Image import Image
from torch import Tensor

from recipes.instruction_tuning.chat import IGNORED, read_template


class Rendered(NamedTuple):
    """A question and its answer as a chat template writes them.

    Attributes:
        text: question and answer, with a mark where the image is.
        prompt: the question and the opening of an answer.
        learnt: tokens of the answer and its end token.
        rest: tokens after those.
        length: tokens in all, the mark counted as one.
    """

    text: str
    prompt: str
    learnt: int
    rest: int
    length: int


class QuestionEncoder:
    """Encode questions about one image each.

    Args:
        processor: of a vision-language model, with a fast tokenizer.
        chat_template: a Jinja template, or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template.

    Raises:
        MisconfigurationException: there is no chat template, or the tokenizer can't tell where its tokens lie.
    """

    def __init__(self, processor: Any, chat_template: str | None = None, system_prompt: str | None = None) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if chat_template is not None and "{" not in chat_template:  # a file name: no template lacks a brace
            chat_template = read_template(chat_template)
        self.template = chat_template or processor.chat_template or self.tokenizer.chat_template
        self.system_prompt = system_prompt
        name = self.tokenizer.name_or_path
        if not isinstance(self.template, str):
            raise MisconfigurationException(
                f"the processor of {name!r} has no single chat template: set chat_template to a Jinja template or to "
                "a file with one, or take an instruction-tuned model"
            )
        if not self.tokenizer.is_fast or not self.tokenizer.eos_token:
            raise MisconfigurationException(
                f"the tokenizer of {name!r} is not a fast one with an end token, so the answer's tokens can't be "
                "located: choose another model"
            )

    def render(self, question: str, answer: str) -> Rendered:
        """A question and its answer as text, and which of its tokens are the answer's.

        Raises:
            MisconfigurationException: the template rewrites the question when it is answered, or the text holds the
                mark of an image.
        """
        prompt, text = self.prompt(question), self._apply(question, answer)
        if not text.startswith(prompt):
            raise MisconfigurationException(
                "the chat template writes a question otherwise when an answer follows, so the answer can't be "
                f"located: set chat_template to one that doesn't. Without: {prompt!r}. With: {text!r}"
            )
        end_token = self.tokenizer.eos_token
        if end_token not in text[len(prompt) :]:  # else nobody would learn to stop
            text = text.rstrip() + end_token
        end = text.rfind(end_token) + len(end_token)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        learnt = sum(a < end and b > len(prompt) for a, b in offsets)
        return Rendered(text, prompt, learnt, sum(a >= end for a, _ in offsets), len(offsets))

    def prompt(self, question: str) -> str:
        """A question as text that an answer is to follow.

        Raises:
            MisconfigurationException: it holds the mark of an image.
        """
        text = self._apply(question, None)
        mark = getattr(self.processor, "image_token", None)
        if mark and mark in question:
            raise MisconfigurationException(f"the question {question!r} holds {mark!r}, the mark of an image")
        return text

    def __call__(self, texts: Sequence[str], images: Sequence[Image], padding_side: str) -> dict[str, Tensor]:
        """The model's inputs for texts with an image each: tokens padded on a side, and pixels."""
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=list(texts),
            images=[[image] for image in images],
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        return dict(inputs)

    def _apply(self, question: str, answer: str | None) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return str(
            self.processor.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer is None
            )
        )


def answer_labels(inputs: dict[str, Tensor], learnt: Sequence[int], rest: Sequence[int]) -> Tensor:
    """Labels (rows, T) of inputs padded on the right: the token itself inside an answer, else -100.

    The image stands before the question, and its mark is one token that becomes many: answers are counted from the end.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, (rows, T).
        learnt: tokens of each row's answer.
        rest: tokens after each.

    Example:
        >>> ids = torch.tensor([[7, 8, 9, 0], [5, 6, 7, 8]])
        >>> answer_labels({"input_ids": ids, "attention_mask": (ids > 0).long()}, [1, 2], [1, 0]).tolist()
        [[-100, 8, -100, -100], [-100, -100, 7, 8]]
    """
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    ends = inputs["attention_mask"].sum(dim=1) - torch.tensor(rest)
    for row, (end, count) in enumerate(zip(ends.tolist(), learnt, strict=True)):
        labels[row, end - count : end] = inputs["input_ids"][row, end - count : end]
    return labels
