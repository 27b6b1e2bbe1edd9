"""The demo's training files and held-out rows, from sentences with human scores. Knows no process, no server."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from demo_assets import Scored, demo_sentences

# Sentences that people scored within half a point of neutral have no sentiment to learn.
_MIN_ABS_SCORE = 0.5
_SEED = 7


@dataclass(frozen=True, slots=True)
class DemoData:
    """Files to train on and sentences to measure with; no sentence is in both."""

    movies: Path
    movies_more: Path
    products: Path
    verdicts: Path
    held_out_movies: list[Scored]
    held_out_products: list[Scored]
    held_out_tweets: list[Scored]


def label_of(row: Scored) -> str:
    return "positive" if row.score > 0 else "negative"


def write_demo_data(
    folder: Path, *, num_movies: int, num_products: int, num_verdicts: int, num_held_out: int
) -> DemoData:
    """Split the sentences once, by a fixed seed, and write the training part in three formats' worth of files."""
    folder.mkdir(parents=True, exist_ok=True)
    movies = _clear_sentences("movies")
    products = _clear_sentences("products")
    tweets = _clear_sentences("tweets")
    held_out_movies, movies = movies[:num_held_out], movies[num_held_out:]
    held_out_products, products = products[:num_held_out], products[num_held_out:]
    held_out_tweets, tweets = tweets[:num_held_out], tweets[num_held_out:]
    return DemoData(
        movies=_write_labels(folder / "movies.csv", movies[:num_movies]),
        movies_more=_write_labels(folder / "movies-more.csv", movies[num_movies : num_movies + num_movies // 4]),
        products=_write_labels(folder / "products.csv", products[:num_products]),
        verdicts=_write_verdicts(folder / "verdicts.jsonl", tweets[:num_verdicts]),
        held_out_movies=held_out_movies,
        held_out_products=held_out_products,
        held_out_tweets=held_out_tweets,
    )


def _clear_sentences(subject: str) -> list[Scored]:
    rows = [row for row in demo_sentences(subject) if abs(row.score) >= _MIN_ABS_SCORE]
    random.Random(_SEED).shuffle(rows)
    return rows


def _write_labels(path: Path, rows: list[Scored]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows((row.text, label_of(row)) for row in rows)
    return path


def _write_verdicts(path: Path, rows: list[Scored]) -> Path:
    """Conversations in which the answer is always one line of JSON with the human score."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            verdict = json.dumps({"sentiment": label_of(row), "score": round(row.score, 1)})
            messages = [{"role": "user", "content": row.text}, {"role": "assistant", "content": verdict}]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path
