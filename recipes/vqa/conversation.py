"""From a question about an image to tokens and pixels, through the model's own processor and chat template."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL.Image import Image, Resampling
from torch import Tensor

from lightning_flatlora.report.conversation import HiddenAnswerError, Message, answer_end, answer_spans
from recipes.instruction_tuning.chat import (
    ASKED,
    IGNORED,
    opening_of,
    read_template,
    takes_system,
    template_errors,
    without_system,
)


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

    A template that takes no system message gets it at the head of the question instead. What a template writes before
    an answer, and not in its generation prompt, is not learnt and stands in prompts too.

    Attributes:
        answer_end: what the template ends an answer with, if it is not the tokenizer's end token; else "".

    Args:
        processor: of a vision-language model, with a fast tokenizer, whose end token also pads if no other does.
        chat_template: a Jinja template, or a file with one; None takes the processor's own.
        system_prompt: a system message; None leaves that to the template.
        template_arguments: variables of the template, as ``{"enable_thinking": False}``.
        max_pixels: largest number of pixels of an image, and so of its tokens; larger ones are scaled down. None leaves
            that to the processor.
        min_pixels: smallest number, likewise; smaller ones are scaled up.

    Raises:
        MisconfigurationException: there is no chat template or it can't be used, or the tokenizer can't tell where its
            tokens lie.
    """

    def __init__(
        self,
        processor: Any,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if chat_template is not None and "{" not in chat_template:  # a file name: no template lacks a brace
            chat_template = read_template(chat_template)
        self.template = chat_template or processor.chat_template or self.tokenizer.chat_template
        self.arguments = template_arguments or {}
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
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
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.system_prompt = system_prompt
        self._takes_system = takes_system(self._render)
        self._opening = opening_of(self._render, must_agree=True)
        self.answer_end = answer_end(self._render, ASKED, self.tokenizer.eos_token)

    def render(self, question: str, answer: str) -> Rendered:
        """A question and its answer as text, and which of its tokens are the answer's.

        Raises:
            MisconfigurationException: the template rewrites the question when it is answered, or the text holds the
                mark of an image.
        """
        messages = [*self._asked(question), {"role": "assistant", "content": answer}]
        prompt = self.prompt(question)
        try:
            text, spans = answer_spans(self._render, messages, self.tokenizer.eos_token)
        except HiddenAnswerError as error:
            raise MisconfigurationException(f"{error}. Set chat_template to one that does neither") from error
        start, end = spans[-1]
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        learnt = sum(a < end and b > start for a, b in offsets)
        return Rendered(text, prompt, learnt, sum(a >= end for a, _ in offsets), len(offsets))

    def prompt(self, question: str) -> str:
        """A question as text that an answer is to follow.

        Raises:
            MisconfigurationException: it holds the mark of an image.
        """
        mark = getattr(self.processor, "image_token", None)
        if mark and mark in question:
            raise MisconfigurationException(f"the question {question!r} holds {mark!r}, the mark of an image")
        return self._render(self._asked(question), True) + self._opening

    def __call__(self, texts: Sequence[str], images: Sequence[Image], padding_side: str) -> dict[str, Tensor]:
        """The model's inputs for texts with an image each: tokens padded on a side, and pixels."""
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=list(texts),
            images=[[sized(image, self.max_pixels, self.min_pixels)] for image in images],
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        return dict(inputs)

    def _asked(self, question: str) -> list[Message]:
        messages = [{"role": "user", "content": question}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages if self._takes_system else without_system(messages)

    def _render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        with template_errors():
            return str(
                self.processor.apply_chat_template(
                    [_with_parts(message) for message in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                    **self.arguments,
                )
            )


def _with_parts(message: Message) -> Message:
    """A message in the form of image-text-to-text templates: a list of parts, and the question's image before it."""
    text = {"type": "text", "text": message["content"]}
    return {**message, "content": [{"type": "image"}, text] if message["role"] == "user" else [text]}


def sized(image: Image, max_pixels: int | None, min_pixels: int | None) -> Image:
    """An image with at most, and at least, so many pixels, in its own proportions; it may be the same one.

    Args:
        image: of any size.
        max_pixels: width times height; None for any.
        min_pixels: likewise.

    Example:
        >>> import PIL.Image
        >>> sized(PIL.Image.new("RGB", (2448, 3264)), 1280 * 28 * 28, None).size
        (867, 1156)
    """
    width, height = image.size
    pixels = width * height
    if max_pixels is not None and pixels > max_pixels:
        scale = math.sqrt(max_pixels / pixels)
        size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    elif min_pixels is not None and pixels < min_pixels:
        scale = math.sqrt(min_pixels / pixels)
        size = math.ceil(width * scale), math.ceil(height * scale)
    else:
        return image
    return image.resize(size, Resampling.BICUBIC)


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
