"""What encoders know of pictures: probe frozen encoders of runs, or test a trained classifier.

    python -m eval.classify_image                                          two encoders, in a minute
    python -m eval.classify_image --data pusht_side --encoder random RUN model.hidden=256
    python -m eval.classify_image --checkpoint RUN [--data FOLDER_OR_ZIP]

A probe trains a linear head on features that are computed once. Training a classifier: python train.py --help.
"""

from eval.shared import classify
from eval.shared.command import Parser, command


@command
def main(arguments=None):
    """The command line."""
    parser = Parser("eval.classify_image", __doc__)
    classify.add_arguments(parser, "an embedded task, a named data set, a folder or a zip (default: pusht_octant)")
    classify.main(parser, arguments, kind="image")


if __name__ == "__main__":
    main()
