"""Pixels, random views, and the real images of a dataset."""

from .audit import describe_source, faults_of
from .classes import choose_classes, find_classes, imagenet_classes, plain_name
from .open_source import reason_of
from .pixels import REFERENCE, UNREADABLE, clamp_, decode, encode, noise, reference_mean_std, to_reference, to_uint8
from .resampling import axis_matrix, resample
from .source import ImageSplit, SourceData, count_classes, load_source, load_test_split, no_images
from .views import View, ViewRows, apply_views, draw_crop, draw_views, from_columns, to_columns
