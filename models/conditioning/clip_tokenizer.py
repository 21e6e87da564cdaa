"""The tokenizer of open_clip, in bounded time: at most a millisecond for any caption.

open_clip tokenizes a whole caption before it cuts it, in time that grows with the square of the
longest word. A caption of 16 KB without a space takes seconds.
"""

import html
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from ftfy.badness import badness
from torch import Tensor

from models.conditioning.captions import bounded

LONGEST_WORD = 64
"""[characters] A longer word is cut into words of this length."""
FOREIGN_A_TOKEN = 2
"""Characters outside ASCII that are read for each token; open_clip's tokens have one or fewer."""
MOST_LINES = 16
"""Lines that ftfy mends one by one; more of them are mended as one line."""
MOST_BAD = 8
"""Wrongly decoded places (`Ã©` for `é`) that ftfy mends, each in up to a tenth of a millisecond."""
WORDS_KEPT = 2**16
"""Words whose tokens are remembered; open_clip remembers every word of the data set."""

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


class ClipTokenizer:
    """Turns captions into token ids, the same as open_clip's SimpleTokenizer.

    They differ for words over LONGEST_WORD alone, and for captions that `bounded` cuts.
    context_length: tokens of a caption with its start and end. options: of SimpleTokenizer.
    """

    def __init__(self, context_length: int, **options: Any) -> None:
        import open_clip  # takes seconds, so not at the top

        library: Any = open_clip  # without type stubs
        self._clip = library.SimpleTokenizer(context_length=context_length, **options)
        self.context_length = context_length
        self.encoder: dict[str, int] = self._clip.encoder
        """Token → id."""
        self.bpe_ranks: dict[tuple[str, str], int] = self._clip.bpe_ranks
        """Pair of tokens that merge → its place in the order of merges."""
        self._word_ids = lru_cache(WORDS_KEPT)(self._merged)

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokenize B captions: ids [B, context_length] int64, cut or padded with 0."""
        captions = [self._bounded(caption) for caption in captions]
        if self._clip.reduction_fn is not None:  # it chooses among all tokens of a caption
            return self._clip(captions)
        ids = torch.zeros(len(captions), self.context_length, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            found = self._ids(caption)
            row[: len(found)] = torch.tensor(found)
        return ids

    def _ids(self, caption: str) -> list[int]:
        """Tokenize a caption, and stop as soon as there are enough tokens."""
        found = [self._clip.sot_token_id]
        for word in self._words(self._clip.clean_fn(caption)):
            found += self._word_ids(word)
            if len(found) >= self.context_length - 1:
                break
        return [*found[: self.context_length - 1], self._clip.eot_token_id]

    def _bounded(self, caption: str) -> str:
        caption = bounded(caption, self.context_length)
        foreign = [found.start() for found in _NOT_ASCII.finditer(caption)]
        limit = FOREIGN_A_TOKEN * self.context_length
        if len(foreign) > limit:
            caption = caption[: foreign[limit]]
        if caption.count("\n") > MOST_LINES:
            caption = " ".join(caption.split())
        plain = html.unescape(caption)
        if badness(plain) > MOST_BAD:
            caption = _NOT_ASCII.sub(" ", plain)
        return caption

    def _words(self, caption: str) -> Iterator[str]:
        for match in self._clip.pat.finditer(caption):
            word: str = match[0]
            for start in range(0, len(word), LONGEST_WORD):
                yield word[start : start + LONGEST_WORD]

    def _merged(self, word: str) -> list[int]:
        """Merge the bytes of a word to tokens (Sennrich et al. 2016, section 3.2): their ids."""
        if word in self._clip.cache:  # the special tokens alone: nothing else is put there
            return [self.encoder[word]]
        symbols = [self._clip.byte_encoder[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        ranks = [self._rank(symbols, place) for place in range(len(symbols) - 1)]
        while ranks and (best := min(ranks)) < math.inf:
            place = 0
            while best in ranks[place:]:  # every occurrence of this pair, from left to right
                place = ranks.index(best, place)
                symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
                del ranks[place]
                for neighbour in (place - 1, place):
                    if 0 <= neighbour < len(ranks):
                        ranks[neighbour] = self._rank(symbols, neighbour)
        return [self.encoder[symbol] for symbol in symbols]

    def _rank(self, symbols: list[str], place: int) -> float:
        return self.bpe_ranks.get((symbols[place], symbols[place + 1]), math.inf)
