"""What computes fast: the CPU's C++ library, a Hopper GPU's kernels, copies that act on the CPU."""
