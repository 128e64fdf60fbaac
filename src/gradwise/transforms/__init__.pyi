# Written by `make stubs`; do not edit.
from gradwise.transforms.clip_norm import ClipNorm as ClipNorm
from gradwise.transforms.gradient_noise import GradientNoise as GradientNoise
from gradwise.transforms.gradient_noise import annealed_noise_std as annealed_noise_std
