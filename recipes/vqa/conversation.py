"""From a question about an image to tokens and pixels, through the model's own processor and chat template."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL.Image import Image, Resampling
from torch import Tensor
from typing_extensions import override

from recipes.language.chat import IGNORED
from recipes.language.conversation import Message
from recipes.language.templates import TemplateEncoder


class Rendered(NamedTuple):
    """A question and its answer, rendered by a chat template.

    Attributes:
        text: question, answer and what was said before, with a mark for the image.
        prompt: the same without the answer, but with the opening of one.
        learnt: for each token of the text, the mark counted as one, whether it is learnt: answers and their end tokens
            are.
        length: number of tokens.
    """

    text: str
    prompt: str
    learnt: list[bool]
    length: int


class QuestionEncoder(TemplateEncoder):
    """Encodes questions about one image each, which comes before the first of them.

    Args:
        processor: processor of a vision-language model, with a fast tokenizer; its end token also pads if no other
            does.
        chat_template: see :class:`recipes.language.templates.TemplateEncoder`.
        system_prompt: see there.
        template_arguments: see there.
        max_pixels: most pixels of an image, which also limits its tokens; larger images are scaled down. None leaves
            that to the processor.

    Raises:
        MisconfigurationException: as there.
    """

    def __init__(
        self,
        processor: Any,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(processor, chat_template, system_prompt, template_arguments)
        self.processor = processor
        self.max_pixels = max_pixels
        # Labels and masks go by positions, so that end tokens are learnt although they pad as well.
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def render(self, question: str, answer: str, history: Sequence[Message] = ()) -> Rendered:
        """Return a question and its answer as text, and which of its tokens are answers.

        Args:
            question: the last question.
            answer: answer to it.
            history: messages before the question, whose answers are learnt too.

        Raises:
            MisconfigurationException: an answer can't be found in the rendered text, or a text holds the mark of an
                image.
        """
        messages = [*self._asked(question, history), {"role": "assistant", "content": answer}]
        prompt = self.prompt(question, history)
        text, spans = self._answers(messages)
        _, learnt = self._tokens(text, list(spans.values()))
        return Rendered(text, prompt, learnt, len(learnt))

    def prompt(self, question: str, history: Sequence[Message] = ()) -> str:
        """Return a question as text for an answer to follow.

        Raises:
            MisconfigurationException: a text holds the mark of an image.
        """
        return self._prompt(self._asked(question, history))

    def __call__(self, texts: Sequence[str], images: Sequence[Image], padding_side: str) -> dict[str, Tensor]:
        """Return the model's inputs for texts with an image each: tokens, padded on one side, and pixels."""
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=list(texts),
            images=[[sized(image, self.max_pixels)] for image in images],  # processors allow several in a text
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            # A template may have written the beginning token itself, which must not come twice.
            add_special_tokens=not (bos and texts[0].startswith(bos)),
        )
        return dict(inputs)

    def _asked(self, question: str, history: Sequence[Message]) -> list[Message]:
        return self._for_template([*history, {"role": "user", "content": question}])

    @override
    def _in_form(self, messages: Sequence[Message]) -> list[Message]:
        """Return lists of parts, as templates with images take them, with the image before the first question."""
        mark = getattr(self.renderer, "image_token", None)
        formed = []
        is_asked = False
        for message in messages:
            if mark and mark in message["content"]:
                raise MisconfigurationException(f"the text {message['content']!r} holds {mark!r}, the mark of an image")
            parts = [{"type": "text", "text": message["content"]}]
            if message["role"] == "user" and not is_asked:
                is_asked = True
                parts.insert(0, {"type": "image"})
            formed.append({**message, "content": parts})
        return formed


def sized(image: Image, max_pixels: int | None) -> Image:
    """Return an image with at most a number of pixels, in its own proportions; a smaller one does not change.

    Args:
        image: of any size.
        max_pixels: largest width times height; None for no limit.

    Example:
        >>> import PIL.Image
        >>> sized(PIL.Image.new("RGB", (2448, 3264)), 1280 * 28 * 28).size
        (867, 1156)
    """
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return image.resize(size, Resampling.BICUBIC)


def answer_labels(inputs: dict[str, Tensor], learnt: Sequence[Sequence[bool]]) -> Tensor:
    """Return labels (rows, T) of inputs padded on the right: the token itself inside an answer, else -100.

    The image comes before all answers, and its mark is one token that becomes many, so tokens are counted from the end.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, (rows, T).
        learnt: for each row's tokens, see :class:`Rendered`.

    Example:
        >>> ids = torch.tensor([[7, 8, 9, 0], [5, 6, 7, 8]])
        >>> inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        >>> answer_labels(inputs, [[True, False], [True, False, True, True]]).tolist()
        [[-100, 8, -100, -100], [5, -100, 7, 8]]
    """
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    ends = inputs["attention_mask"].sum(dim=1).tolist()
    for row, (end, marks) in enumerate(zip(ends, learnt, strict=True)):
        columns = torch.arange(end - len(marks), end)[torch.tensor(marks)]
        labels[row, columns] = inputs["input_ids"][row, columns]
    return labels
