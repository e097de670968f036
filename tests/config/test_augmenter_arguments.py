"""The flags of a query augmenter."""

from __future__ import annotations

import pytest

from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments, PreferenceArguments
from rag_rl.data.reinforced_ir import AUGMENTATION_PREFIX
from rag_rl.errors import ConfigError


def test_defaults_are_the_published_ones():
    args, preferences = AugmenterArguments(), PreferenceArguments()
    assert (args.augmenter_prefix, args.augmenter_weight) == (AUGMENTATION_PREFIX, 0.8)
    assert (args.augmenter_max_new_tokens, args.augmenter_side) == (300, "document")
    assert (preferences.preference_signal, preferences.preference_threshold) == ("published", 0.95)
    assert (preferences.preference_candidates, preferences.preference_temperature) == (10, 0.9)
    assert (AugmenterModelArguments().augmenter_name, AugmenterModelArguments().augmenter_model) == ("local", None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"augmenter_max_new_tokens": 0}, "augmenter_max_new_tokens must be at least 1, got 0"),
        ({"augmenter_batch_size": 0}, "augmenter_batch_size must be at least 1, got 0"),
        ({"augmenter_weight": 1.2}, r"augmenter_weight must lie in \[0, 1\], got 1.2"),
    ],
)
def test_augmenters_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        AugmenterArguments(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"preference_candidates": 1}, "preference_candidates must be at least 2, got 1"),
        ({"preference_batch_size": 0}, "preference_batch_size must be at least 1, got 0"),
        ({"preference_negatives": 0}, "preference_negatives must be at least 1, got 0"),
        ({"preference_per_query": 0}, "preference_per_query must be at least 1, got 0"),
        ({"preference_temperature": 0.0}, "preference_temperature must be above 0, got 0.0"),
        ({"preference_threshold": 0.0}, "preference_threshold must be above 0, got 0.0"),
        ({"preference_top_p": 0.0}, "preference_top_p must be above 0 and at most 1, got 0.0"),
        ({"preference_top_p": 1.1}, "preference_top_p must be above 0 and at most 1, got 1.1"),
        ({"preference_min_gain": -1.0}, "preference_min_gain must be at least 0, got -1.0"),
        ({"preference_min_gap": -1.0}, "preference_min_gap must be at least 0, got -1.0"),
        ({"preference_length_penalty": -1.0}, "preference_length_penalty must be at least 0, got -1.0"),
        ({"preference_false_negative_margin": 2.0}, r"must lie in \[0, 1\], got 2.0"),
        ({"preference_max_length_ratio": 0.5}, "preference_max_length_ratio must be at least 1, got 0.5"),
        ({"preference_per_query": 2}, "preference_per_query has no effect with preference_signal published"),
        ({"preference_min_gap": 0.1}, "preference_min_gap has no effect with preference_signal published"),
    ],
)
def test_preferences_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        PreferenceArguments(**options)


def test_shaping_belongs_to_the_signals_of_our_own():
    args = PreferenceArguments(preference_signal="rank", preference_per_query=2, preference_max_length_ratio=1.5)
    assert args.preference_per_query == 2
