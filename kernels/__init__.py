"""Triton kernels, installed as ``fastlstm.kernels``; they import torch, triton and each other."""
