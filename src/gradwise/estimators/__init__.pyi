# Written by `make stubs`; do not edit.
from gradwise.core.seeded import SeededGradient as SeededGradient
from gradwise.estimators.backprop import Backprop as Backprop
from gradwise.estimators.zo_bench import SPSA as SPSA
from gradwise.estimators.zo_bench import spsa as spsa
