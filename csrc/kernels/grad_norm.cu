#include "kernels/grad_norm.cuh"
