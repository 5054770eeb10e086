"""What encoders know of clips: probe frozen encoders of runs, or test a trained classifier.

    python -m eval.classify_video                                          which way a block turns, in two minutes
    python -m eval.classify_video --data FOLDER --encoder random RUN
    python -m eval.classify_video --checkpoint RUN [--data FOLDER]

A probe trains a head on the features of single frames, in order. FOLDER holds train.csv and test.csv (or val.csv) of
lines "path label" or "path,label". Training a classifier: python train.py --help.
"""

from eval.shared import classify
from eval.shared.command import Parser, command


@command
def main(arguments=None):
    """The command line."""
    parser = Parser("eval.classify_video", __doc__)
    classify.add_arguments(parser, "an embedded task or a folder (default: pusht_turn)")
    classify.main(parser, arguments, kind="video")


if __name__ == "__main__":
    main()
