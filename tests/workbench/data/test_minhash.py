"""Near-duplicates: the estimate of the similarity, and which texts are compared."""

from __future__ import annotations

import math
import random

import numpy as np

from negative_cache.workbench.data.minhash import NUM_HASHES, resembles_earlier, signatures


def test_equal_hashes_estimate_the_share_of_common_trigrams():
    chance = random.Random(0)
    words = [f"w{number}" for number in range(3_000)]
    errors, variances = [], []
    for _ in range(300):
        text = chance.choices(words, k=100)
        changed = list(text)
        for at in chance.sample(range(100), chance.randrange(25)):
            changed[at] = chance.choice(words)
        a, b = ({tuple(part[at : at + 3]) for at in range(98)} for part in (text, changed))
        similarity = len(a & b) / len(a | b)
        first, second = signatures([" ".join(text), " ".join(changed)])
        errors.append((first == second).mean() - similarity)
        variances.append(similarity * (1 - similarity) / NUM_HASHES)  # of independent hashes
    deviation = math.sqrt(np.mean(variances))
    assert abs(np.mean(errors)) < 4 * deviation / math.sqrt(len(errors))
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / deviation < 1.2


def test_a_text_resembles_only_texts_of_earlier_groups():
    text = " ".join(f"word{number}" for number in range(40))
    other = " ".join(f"other{number}" for number in range(40))
    rows = signatures([text, f"{text} more", other, text, other])
    assert resembles_earlier(rows, np.array([0, 0, 0, 1, 2])).tolist() == [False, False, False, True, True]
    assert resembles_earlier(rows, np.arange(5)).tolist() == [False, True, False, True, True]
    assert resembles_earlier(signatures([]), np.arange(0)).tolist() == []


def test_texts_without_blanks_between_words_and_of_all_alphabets_are_told_apart():
    texts = [
        "机器学习是人工智能的一个分支",
        "今天下午的天气非常好",
        "машинное обучение это раздел",
        "завтра утром будет дождь",
    ]
    near = ["机器学习是人工智能的一个分支。", "今天下午的天气非常好。", "", ""]
    rows = signatures([*texts, *near])
    assert resembles_earlier(rows, np.arange(8)).tolist() == [False] * 4 + [True, True, False, True]


def test_many_copies_of_one_text_are_found_quickly():
    text = " ".join(f"word{number}" for number in range(40))
    rows = signatures(f"{text} {number}" for number in range(5_000))
    assert resembles_earlier(rows, np.arange(5_000)).sum() == 4_999
