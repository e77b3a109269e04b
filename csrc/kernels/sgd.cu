#include "kernels/sgd.cuh"
