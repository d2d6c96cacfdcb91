"""The distillation methods (PRISM, SRe2L, G-VBSM), one file per idea, in the order of docs/method.md.

start_images   the real images, or mosaics of real patches, from which the optimization starts
alignment      the distance between the feature statistics of a batch and those of real data in a frozen network
moments        means and variances of a layer's input, and their distance to targets, with closed-form gradients
statistics     averages of the statistics of layer inputs over real data, for layers without running statistics
densification  a regularizer that makes the images of a class span more directions
objective      the loss of one step and its gradient, one teacher at a time
synthesis      the optimization loop: draw a view, compute the gradient, take an Adam step
relabel        the teachers label random views of the shipped images
soft_labels    losses for training a student on these labels

None of these modules deals with files, locks, checkpoints, progress reports, stop signals or network access.
"""

from .alignment import Alignment, describe_norms
from .objective import Compile, Precision
from .relabel import ask_teachers, drawn_batches, joined, relabel_batches, relabel_epoch
from .soft_labels import class_shares, hard_label_loss, soft_label_loss
from .start_images import check_candidates, choose_start_images, real_rows
from .statistics import BATCH_SIZE, data_norms, gather_norms, gather_statistics, shuffled_batches
from .synthesis import Step, synthesize
