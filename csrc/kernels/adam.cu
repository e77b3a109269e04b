#include "kernels/adam.cuh"
