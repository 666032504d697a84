"""The parts of `conformance.ConformanceSuite`, by theme."""
