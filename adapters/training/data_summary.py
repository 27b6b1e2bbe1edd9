"""What a set of examples is like, in figures that a person should see before training. Knows no model and no files."""

from collections.abc import Sequence
from dataclasses import dataclass

from loractl.adapters.training.examples import Example, Prepared
from loractl.adapters.training.rows import Row, row_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """Rows and tokens of the data as read; lengths are of the rows that are kept, of a pair the longer answer's."""

    form: str
    num_rows: int
    num_eval_rows: int
    num_duplicates: int
    """Rows whose contents an earlier row has already; they are trained on all the same."""
    num_overlong: int
    """Rows above the limit: dropped, or cut where the recipe says so."""
    num_tokens_lost: int
    tokens_p50: int
    tokens_p95: int
    tokens_max: int
    num_tokens: int
    """Tokens of the rows to train on."""
    num_learned_tokens: int

    @property
    def learned_share(self) -> float:
        """The share of the tokens that is learned."""
        return self.num_learned_tokens / max(1, self.num_tokens)

    def sentence(self) -> str:
        """Say it in one line."""
        what = "pairs" if self.form == "preference" else f"rows {self.form}"
        parts = [f"{self.num_rows:,} {what}", f"{self.num_eval_rows:,} held out"]
        if self.num_duplicates:
            parts.append(f"{self.num_duplicates:,} duplicates")
        if self.num_overlong:
            parts.append(f"{self.num_overlong:,} too long ({self.num_tokens_lost:,} tokens lost)")
        return (
            f"{', '.join(parts)}; tokens p50 {self.tokens_p50:,} p95 {self.tokens_p95:,} max {self.tokens_max:,}; "
            f"{self.num_learned_tokens:,} of {self.num_tokens:,} learned ({self.learned_share:.0%})"
        )


def summarize(rows: Sequence[Row], prepared: Prepared, *, train: Sequence[Example], num_eval_rows: int) -> DataSummary:
    """Count what was read, what is left of it, and what is learned."""
    lengths = sorted(example.longest for example in prepared.examples)
    return DataSummary(
        form=rows[0].form,
        num_rows=len(train),
        num_eval_rows=num_eval_rows,
        num_duplicates=num_duplicates(rows),
        num_overlong=prepared.num_overlong,
        num_tokens_lost=prepared.num_tokens_lost,
        tokens_p50=lengths[len(lengths) // 2],
        tokens_p95=lengths[int(len(lengths) * 0.95)],
        tokens_max=lengths[-1],
        num_tokens=sum(example.num_tokens for example in train),
        num_learned_tokens=sum(example.num_learned for example in train),
    )


def num_duplicates(rows: Sequence[Row]) -> int:
    """Count rows whose contents an earlier one has already."""
    return len(rows) - len({row_digest(row) for row in rows})
