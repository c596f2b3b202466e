/* `hotstage-engine devices`: what CUDA devices this machine has, as one line of JSON on standard
 * output. The supervisor asks a process of its own for it, so that no process that lives long holds
 * the driver, and a driver that hangs or crashes ends nothing but that.
 *
 *   {"devices":[{"index":0,"name":"…","uuid":"GPU-…","bus":"0000:3b:00",
 *    "capability":90,"memory":85899345920}],
 *    "why":"","driver":true,"chosen":null}
 *
 * why: why there are none, for people; driver: NVIDIA's is loaded; chosen: HOTSTAGE_DEVICES as the
 * environment has it, or null. Who reads it (checkpoint/agent/devices.py) decides which of them the ranks get. */
#ifndef HS_RUN_DEVICES_H
#define HS_RUN_DEVICES_H

#include "core/status.h"

/* Bytes of the line, at most: more devices than fit are an error. */
#define HS_DEVICES_LINE_MAX 32768

/* HS_OK also where there are none. */
hs_status hs_devices_print(hs_why *why);

#endif
