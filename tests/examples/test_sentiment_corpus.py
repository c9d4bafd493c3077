import re

import pytest

from examples.sentiment import corpus
from examples.sentiment.corpus import GOLD, PREFERENCES, PROMPTS, Review, clean_text, read_reviews, split_position


@pytest.mark.parametrize(
    ("raw", "prose"),
    [
        ("a film , in short , that works .", "A film, in short, that works."),
        ("well . . . i don't know , i'm torn", "Well... I don't know, I'm torn."),
        ('the new " conan " is here !', 'The new "conan" is here!'),
        ("costs $1 . 8 million ( or more ) ; bad", "Costs $1.8 million (or more); bad."),
        ("[schweiger is] talented .", "Schweiger is talented."),
        ("no plot . no point ? none .", "No plot. No point? None."),
        ("hard- boiled , two- and three-hour epics", "Hard-boiled, two- and three-hour epics."),
        (". . . has freaky scenes .", "Has freaky scenes."),
        ("Good.<br /><br />very good.", "Good. Very good."),
        ("mr . broomfield stars .", "Mr. Broomfield stars."),
        ("fun \x96 for kids\x85 .", "Fun - for kids..."),
    ],
)
def test_clean_text_makes_ordinary_prose(raw, prose):
    assert clean_text(raw) == prose


def test_cleaning_clean_text_changes_nothing():
    once = clean_text('it is " fine " , mr . smith . . . i think ; we agree')

    assert clean_text(once) == once


def test_split_position_sees_letters_and_digits_only():
    # By hand: the key of all three is "itsfun2".
    assert split_position("It's fun 2!") == split_position("it 's fun , 2") == split_position("itsfun2")
    assert 0 <= split_position("anything") < 1


def test_each_text_is_in_exactly_one_part():
    reviews = [Review(f"sentence number {i}", bool(i % 2), "rotten_tomatoes") for i in range(400)]

    parts = [corpus.take_part(reviews, part, "rotten_tomatoes") for part in (PREFERENCES, PROMPTS, GOLD)]

    assert sorted(review for part in parts for review in part) == sorted(reviews)
    # The shares are 0.37, 0.13, 0.5; four standard deviations of 400 draws of a half are 0.1.
    assert [len(part) / 400 for part in parts] == pytest.approx([0.37, 0.13, 0.5], abs=0.1)
    assert corpus.take_part(reviews, GOLD, "imdb") == []


def test_a_part_does_not_depend_on_the_order_of_the_file():
    reviews = [Review(f"sentence number {i}", True, "imdb") for i in range(50)]

    assert corpus.take_part(reviews, GOLD, "imdb") == corpus.take_part(reviews[::-1], GOLD, "imdb")


def test_read_reviews_cleans_and_keeps_repeated_texts_once(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(
        'text,label,source\n"good , really",1,imdb\n"good, really",0,imdb\n,0,imdb\nbad,0,rotten_tomatoes\n'
    )

    assert read_reviews(path) == [
        Review("Good, really.", True, "imdb"),
        Review("Bad.", False, "rotten_tomatoes"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,source\na,b\n", "expected the columns text, label, source, got ['text', 'source']"),
        ("text,label,source\na,1,b\na,good,b\n", "row 3: expected label 0 or 1, got 'good'"),
    ],
)
def test_read_reviews_names_what_is_wrong_with_the_file(tmp_path, content, message):
    path = tmp_path / "reviews.csv"
    path.write_text(content)

    with pytest.raises(ValueError, match=f"reviews.csv.*{re.escape(message)}"):
        read_reviews(path)


def test_a_missing_package_is_answered_with_the_command_that_installs_it():
    with pytest.raises(ModuleNotFoundError, match="'no_such_package_here': pip install it"):
        corpus.package_folder("no_such_package_here", "pip install it")
