"""The metrics give what the field's reference implementations give.

The expected values were made with them: the answer processor of EvalAI (and the VQA evaluation over it) as the original
program uses it, and the Penn Treebank tokenizer of pycocoevalcap (Stanford CoreNLP 3.4.1).
"""

import pytest
from nltk.metrics import edit_distance

from dreamllm_jax.evaluation import anls, cider, pope, scores, vqa_accuracy

NORMALISED = {
    "": "",
    "   ": "",
    "The dog": "dog",
    "a": "",
    "Ten": "10",
    "10": "10",
    "none": "0",
    "two dogs and a cat": "2 dogs and cat",
    "1,000": "1000",
    "1,000,000 people": "1000000 people",
    "3.5": "3.5",
    "v.2": "v.2",
    "U.S.A.": "usa",
    "yes.": "yes",
    "No!": "no",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "Im": "im",
    "dog's bowl": "dog 's bowl",
    "it's": "it 's",
    "red/white": "red white",
    "red / white": "red white",
    "t-shirt": "t shirt",
    "well - known": "well known",
    '"quoted"': "quoted",
    "what?": "what",
    "café": "café",
    "日本": "日本",
    "Éa the": "éa",
    "a_b": "b",
    "5:30 pm": "5:30 pm",
    "$5": "$5",
    "50%": "50%",
    "new\nline": "new line",
    "tab\there": "tab here",
    "one; two": "1 2",
    "(left)": "left",
    "an apple a day": "apple day",
    "hes": "he's",
    "ow's'at": "ow 's'at",
    "the the": "",
    "rock & roll": "rock & roll",
    "x@y.com": "x ycom",
    "...": "",
    "3 .": "3",
    ".5": ".5",
}


@pytest.mark.parametrize(("answer", "want"), NORMALISED.items())
def test_answers_are_normalised_as_the_server_does(answer, want):
    assert vqa_accuracy.normalise(answer) == want


@pytest.mark.parametrize(
    ("answer", "annotated", "want"),
    [
        ("ten", ["10"] * 3 + ["eleven"] * 7, 0.9),  # one of the three is left out in three of ten turns
        ("10", ["ten", "Ten", "10."] + ["9"] * 7, 0.9),
        ("a dog", ["the dog"] * 2 + ["cat"] * 8, 0.6),
        ("dog", ["Dog!"] + ["cat"] * 9, 0.3),
        ("", [""] * 4 + ["x"] * 6, 1.0),
        ("1,000", ["1000"] * 10, 1.0),
        ("dont know", ["don't know"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["no"] * 10, 0.0),
        ("café", ["cafe"] * 5 + ["café"] * 5, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
    ],
)
def test_vqa_accuracy(answer, annotated, want):
    assert vqa_accuracy.accuracy(answer, annotated) == pytest.approx(want)


@pytest.mark.parametrize(
    ("answer", "accepted", "want"),
    [
        ("Mount  Everest", ["mount everest"], 1.0),
        ("everest", ["mount everest", "K2"], 7 / 13),
        ("", ["x"], 0.0),
        ("", ["", "x"], 1.0),
        ("abcd", ["abxy"], 0.5),  # at the threshold
        ("abcd", ["axyz"], 0.0),
        ("größe 10", ["grösse 10"], 7 / 9),
        ("12,5", ["12.5", "13"], 0.75),
    ],
)
def test_anls(answer, accepted, want):
    assert anls.similarity(answer, accepted) == pytest.approx(want)


def test_distances_are_those_of_nltk():
    words = [*NORMALISED, "kitten", "sitting"]
    assert all(anls.distance(a, b) == edit_distance(a, b) for a in words for b in words[::3])


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is none.", False),
        ("no", False),
        ("There is not. Yes", False),
        ("Yes. No dog barks", True),  # only the first sentence counts
        ("NO", True),  # the published rule knows three spellings
        ("nothing", True),
        ("", True),
    ],
)
def test_what_counts_as_yes(answer, yes):
    assert pope.says_yes(answer) == yes


def test_pope():
    answers = ["yes"] * 4 + ["no"] * 2 + ["yes", "no", "no", "no"]  # 4 hits, 2 misses, 1 false alarm, 3 rejections
    found = pope.scores(answers, [True] * 6 + [False] * 4)
    want = {"accuracy": 0.7, "precision": 0.8, "recall": 4 / 6, "f1": 8 / 11, "yes_ratio": 0.5}
    assert found == pytest.approx(want)
    assert pope.scores(["no"], [False]) == {"accuracy": 1.0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


TOKENIZED = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    (
        "Two dogs, one brown & one white, aren't playing (outside).",
        "two dogs one brown & one white are n't playing -lrb- outside -rrb-",
    ),
    (
        "It's a child's toy - a \"red\" car; cannot see its driver!",
        "it 's a child 's toy a red car can not see its driver",
    ),
    (
        "A sign that says 'STOP' at 5:30 p.m. near the U.S. border...",
        "a sign that says stop at 5:30 p.m. near the u.s. border",
    ),
    ("", ""),
    ("A café with crème brûlée for $5.99 -- 50% off", "a café with crème brûlée for $ 5.99 50 % off"),
    ("a black-and-white photo of a 1950's t-shirt/hat", "a black-and-white photo of a 1950 's t-shirt/hat"),
    ("women's tennis match: 3-2", "women 's tennis match 3-2"),
    ("I'm gonna wanna go; they've got 10,000 people?", "i 'm gon na wan na go they 've got 10,000 people"),
    ("the dogs' bowls", "the dogs bowls"),
    ("A [blue] bird", "a -lsb- blue -rsb- bird"),
    ("日本 の 猫", "日本 の 猫"),
    ("St. Pancras e.g. the station", "st. pancras e.g. the station"),
    ("\u201cHello\u201d he said \u2013 it\u2019s fine", "hello he said it 's fine"),
    ("ten people and 10 dogs", "ten people and 10 dogs"),
    ("A kite flying in the sky\n over the beach .", "a kite flying in the sky over the beach"),
    ("A boy stands on a field. He has a hat.", "a boy stands on a field he has a hat"),
    ("A bus. It is red..", "a bus it is red"),
    ('He said "go." Then (it is late.) he went.!', "he said go then -lrb- it is late -rrb- he went"),
    ("Dr. Smith lives on Main St. The U.S. flag at 5 p.m.", "dr. smith lives on main st. the u.s. flag at 5 p.m."),
    ("We wash. In Wash. there is mass. Mass. is etc... far", "we wash in wash. there is mass mass. is etc. far"),
    ("See no. 5 and fig. 2. No. No fig. Plan B. Then I go.", "see no. 5 and fig. 2 no no fig plan b then i go"),
    ("Made by Acme Inc., a man., and 3.5 m. Well-st. is it", "made by acme inc. a man. and 3.5 m. well-st is it"),
]


@pytest.mark.parametrize(("caption", "want"), TOKENIZED)
def test_captions_are_tokenized_as_in_coco(caption, want):
    assert cider.tokenize(caption) == want


def test_cider():
    references = [["A red fox in the snow.", "a fox standing in snow"], ["two dogs on a beach"], ["a city at night"]]
    perfect = cider.cider([some[0] for some in references], references)
    found = cider.cider(["a red fox in snow", "two dogs", ""], references)
    assert perfect[1:] == pytest.approx([10.0, 10.0])  # the only reference, word for word
    assert perfect[0] > found[0] > found[1] > found[2] == 0.0


def test_means_have_standard_errors():
    metrics, errors = scores.summary({"a": [False, True, True, False], "b": [0.25], "c": 8.5})
    assert metrics == {"a": 0.5, "b": 0.25, "c": 8.5} and errors == {"a": pytest.approx((1 / 3) ** 0.5 / 2), "b": 0.0}
