"""Models on a policy's vision encoder: classifiers, keypoints, masked autoencoding.

A new one is one file here, a line in MODELS (policy/build.py), a line in BENCHMARKS (eval/benchmark/__init__.py) that
says how it is judged, and config/model/NAME.yaml.
"""
