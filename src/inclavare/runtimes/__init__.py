"""Enclave runtimes: what runs an application inside an enclave, one file each behind one small interface."""
