/* The links of a CUDA device (backend/links.h). */
#ifndef HS_BACKEND_CUDA_LINKS_H
#define HS_BACKEND_CUDA_LINKS_H

extern "C" {
#include "backend/links.h"
}

namespace hs_cuda {

extern const hs_link_table links;

}

#endif
