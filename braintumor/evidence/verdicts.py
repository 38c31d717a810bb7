"""What a comparison with the champion can come to, as evidence.json words it."""

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference found"
NOT_COMPARABLE, NO_CHAMPION = "not comparable", "no champion"
# The reason for which a champion that is evaluated again is comparable with nothing.
SAME_MODEL = "the champion is this very model"
