"""The words of the page: complete in every language, every word in use."""

import re
import string
from pathlib import Path

import pytest

from webapp.text import LOCALES, TRANSLATIONS, Words, words_for

WEBAPP = Path(__file__).parent.parent / "webapp"
ENGLISH = TRANSLATIONS["en"]


def placeholders(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("locale", LOCALES)
def test_every_language_has_every_word(locale):
    assert set(TRANSLATIONS[locale]) == set(ENGLISH)
    assert all(text.strip() for text in TRANSLATIONS[locale].values())


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("key", ENGLISH)
def test_translation_takes_the_same_values(locale, key):
    assert placeholders(TRANSLATIONS[locale][key]) == placeholders(ENGLISH[key])


@pytest.mark.parametrize("locale", ["zh", "ja"])
def test_sentences_are_translated(locale):
    same = {key for key in ENGLISH if TRANSLATIONS[locale][key] == ENGLISH[key]}
    assert not {key for key in same if " " in ENGLISH[key]}


def test_every_word_is_used():
    code = "".join(
        path.read_text("utf-8") for path in WEBAPP.glob("*.py") if path.name != "text.py"
    )
    made = ("finish_",)  # put together from a finish reason
    names = {key for key in ENGLISH if not key.startswith(made)}
    assert not {key for key in names if not re.search(rf"""["']{key}["']""", code)}


@pytest.mark.parametrize(
    ("header", "locale"),
    [
        (None, "en"),
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("ja", "ja"),
        ("fr-FR,ja;q=0.5", "ja"),
        ("fr", "en"),
        ("en-GB,zh;q=0.5", "en"),
        (";;,,\x00", "en"),
    ],
)
def test_language_is_the_first_one_of_the_browser_that_there_is(header, locale):
    assert words_for(header)("send") == Words(locale)("send")


def test_values_are_put_into_the_words():
    assert Words("en")("version", place=2, count=3) == "Version 2 of 3"
