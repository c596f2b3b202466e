/* Which backend an attempt's device kind is (wire/attempt.h): the CPU's is built in, CUDA's is the
 * library that HOTSTAGE_CUDA names, else libhs_cuda.so beside this program, else where the system
 * looks. It exports one function, hs_cuda_backend, whose table's version is looked at before
 * anything else of it. A library that was opened stays for the process. */
#ifndef HS_BACKEND_LOAD_H
#define HS_BACKEND_LOAD_H

#include "backend/backend.h"

/* HS_E_UNSUPPORTED with what is missing, and what to do: no library, one of another version, a
 * program that cannot open libraries (the static one), a kind that does not exist. */
hs_status hs_backend_load(uint32_t kind, const hs_backend **backend, hs_why *why);

#endif
