"""Tables for the terminal and for a document."""

from collections.abc import Sequence

from pandas import DataFrame


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Make a table for the terminal from lines of cells, the first of which is the head.

    Example:
        >>> print(aligned([["method", "loss"], ["LoRA", "2.1"]]))
        method loss
          LoRA  2.1
    """
    head, *body = lines
    return str(DataFrame(body, columns=head).to_string(index=False))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table from lines of cells, the first of which is the head.

    Example:
        >>> print(markdown([["a", "b"], ["1", ""]]))
        | a | b |
        |---|---|
        | 1 |  |
    """
    head, *body = lines
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
