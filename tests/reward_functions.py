"""Functions that tests name as rewards, in the shape of TRL's."""


def length(completions, **kwargs):
    """A tenth of a point for each character."""
    return [0.1 * len(completion) for completion in completions]


def vowels(completions):
    """Two members of different origin and unit."""
    return [[sum(c in "aeiou" for c in text), 10.0 + 5 * text.count("e")] for text in completions]


def sizes(completions):
    """Two members of different origin and unit, of any text."""
    return [[len(text), 10.0 + 5 * len(text.encode()) ** 0.5] for text in completions]


def to_the_even(prompts, completions):
    """Applies to every other prompt, by its length."""
    pairs = zip(prompts, completions, strict=True)
    return [None if len(prompt) % 2 else float(len(text)) for prompt, text in pairs]


def two_to_the_even(prompts, completions):
    """The same with two members."""
    return [None if one is None else [one, one**0.5] for one in to_the_even(prompts, completions)]


def answered(completions, answer):
    """A column of the prompts' file is there."""
    return [float(given in text) for text, given in zip(completions, answer, strict=True)]


async def waited(completions):
    """As `length`."""
    import asyncio

    await asyncio.sleep(0)
    return length(completions)


class Judge:
    """A method, by its path in the module."""

    @staticmethod
    def score(completions):
        return [1.0 for _ in completions]


NUMBER = 3
