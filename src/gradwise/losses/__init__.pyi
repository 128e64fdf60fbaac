# Written by `make stubs`; do not edit.
from gradwise.losses.comp_sum import CompSumLoss as CompSumLoss
from gradwise.losses.comp_sum import comp_sum_loss as comp_sum_loss
from gradwise.losses.comp_sum import h_consistency_bound as h_consistency_bound
from gradwise.losses.comp_sum_adversarial import SmoothAdversarialCompSumLoss as SmoothAdversarialCompSumLoss
from gradwise.losses.comp_sum_adversarial import smooth_adversarial_comp_sum as smooth_adversarial_comp_sum
