"""Word lists: stop words of search, colours of the reward, words of product names that are no nouns."""

from __future__ import annotations

from typing import Final


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STOP_WORDS: Final = frozenset(
    _listed(
        """
        a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
        to was will with
        """
    )
)
"""Lucene's default English stop words."""

COLOURS: Final = _listed(
    """
    alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo
    caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream
    crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather
    indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha
    multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal
    rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise
    violet walnut wheat white wine yellow
    """
)
"""WebShop's colour words (MIT licence), in its order: the first that occurs in a value stands for the value."""

NO_NOUNS: Final = frozenset(
    _listed(
        """
        a about additional adjustable after all an and anti any are as at authentic available be beautiful before best
        better between big black blue both bright brown but by can casual cheap classic clean clear cm cold comfortable
        compact compatible complete cool ct cute dark deep deluxe different double dry durable each easy electric
        elegant every extra fast fine fl flat flexible for formal free fresh from ft full funny gb genuine gold good
        gray great green grey handmade hard he heavy her high his hot ideal if in indoor instant into is it its kg large
        lb lbs light lightweight little long low luxurious me medium mg mini ml mm modern more most multi multiple my
        natural new nice no non non-slip not novel of off old on one or organic original other our out outdoor over own
        oz pcs per perfect pink plain portable practical premium pure purple quick random real red regular reusable
        rustic she short silent similar simple single slim small smart smooth so soft solid special stainless standard
        strong stylish suitable super sweet tall tb than that the their them these they thick thin this those tiny to
        top traditional transparent two ultra under unique unisex universal up us useful vegan vintage warm was washable
        waterproof we were what when which while white who whole wide will wireless with without yellow you your yummy
        """
    )
)
"""Function words, measures, and the adjectives and adverbs that shops put into names."""

NOUNS: Final = frozenset(
    _listed(
        """
        assembly butterfly family handful hundred monopoly spoonful supply turntable vegetable timetable thimbleful
        """
    )
)
"""Nouns that end as adjectives, adverbs or participles do."""
