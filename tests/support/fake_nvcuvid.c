/* Stands in for libnvcuvid.so.1: the calls that fastvid makes, on the host, over a bit stream that hides nothing.

   A packet is a header of eight 32-bit numbers, then the samples of an NV12 picture of the coded size. Pictures are
   shown in the order of their time stamps, one behind the newest. What is given back is overwritten at once.

   Of VP8 and VP9 the parser loses the time stamps. A VP8 packet is shown if the bit 0x10 of its first byte is set. */
#include <stdlib.h>
#include <string.h>

typedef struct { int magic, width, height, coded_width, coded_height, status, interlaced, field; } Header;
typedef struct { int codec; unsigned rate[2]; unsigned char progressive, depth, chroma_depth, surfaces;
                 unsigned coded_width, coded_height; int left, top, right, bottom, chroma; unsigned bit_rate;
                 int aspect[2]; unsigned char signal[4]; unsigned header_bytes; } Format;
typedef struct { unsigned long width, height, surfaces; int codec, chroma; unsigned long flags, depth, intra, max_width,
                 max_height, reserved1; short area[4]; int format, deinterlace; unsigned long target_width,
                 target_height, output_surfaces; void *lock; short target[4]; unsigned long histogram, reserved2[4];
               } CreateInfo;
typedef struct { unsigned width, height, target_width, target_height, surfaces, reserved[12]; } ReconfigureInfo;
typedef struct { int width_in_blocks, height_in_blocks, surface, is_field, is_bottom, is_second; unsigned bytes;
                 const unsigned char *data; unsigned slices; char rest[8192]; } Picture;
typedef struct { int surface, progressive, top_first, repeat_first; long long timestamp; } Shown;
typedef struct { unsigned long flags, size; const unsigned char *payload; long long timestamp; } Packet;
typedef struct { int codec; unsigned surfaces, clock, threshold, delay, bits, reserved1[4]; void *user;
                 int (*sequence)(void *, Format *); int (*decode)(void *, Picture *); int (*display)(void *, Shown *);
               } Parameters;
enum { MOST = 64 };
typedef struct { CreateInfo about; unsigned width, height, surfaces; unsigned char *surface[MOST]; int status[MOST];
                 unsigned char *output[MOST]; int taken[MOST]; } Decoder;
typedef struct { Parameters about; int width, height, surfaces, next, waiting, progressive; Shown queue[MOST]; } Parser;

int created, reconfigured, mapped, most_mapped, decoders, parsers;  /* what tests ask */
void reset_counts(void) { created = reconfigured = most_mapped = 0; }

static size_t picture_bytes(unsigned width, unsigned height) { return (size_t)width * height * 3 / 2; }
static unsigned pitch_of(unsigned width) { return (width + 255) / 256 * 256; }

int cuvidGetDecoderCaps(unsigned char *caps) {
  int codec = *(int *)caps, chroma = ((int *)caps)[1], depth = ((int *)caps)[2];
  caps[24] = (codec == 4 || codec == 8 || codec == 9 || codec == 10) && chroma == 1 && depth == 0;
  caps[25] = 2;
  *(unsigned short *)(caps + 26) = 1;
  *(unsigned *)(caps + 28) = *(unsigned *)(caps + 32) = 4096;
  *(unsigned *)(caps + 36) = 65536;
  *(unsigned short *)(caps + 40) = *(unsigned short *)(caps + 42) = 16;
  return 0;
}

int cuvidCreateDecoder(Decoder **made, CreateInfo *about) {
  if (about->surfaces > MOST || about->output_surfaces > MOST || about->width > about->max_width ||
      about->height > about->max_height || about->target_width != about->width) return 1;
  Decoder *decoder = calloc(1, sizeof *decoder);
  decoder->about = *about;
  decoder->width = about->width, decoder->height = about->height, decoder->surfaces = about->surfaces;
  for (unsigned i = 0; i < about->surfaces; i++)
    decoder->surface[i] = malloc(picture_bytes(about->max_width, about->max_height));
  for (unsigned i = 0; i < about->output_surfaces; i++)
    decoder->output[i] = malloc((size_t)pitch_of(about->max_width) * about->max_height * 3 / 2);
  created++, decoders++;
  *made = decoder;
  return 0;
}

int cuvidReconfigureDecoder(Decoder *decoder, ReconfigureInfo *about) {
  if (about->width > decoder->about.max_width || about->height > decoder->about.max_height ||
      about->surfaces > decoder->about.surfaces) return 1;
  decoder->width = about->width, decoder->height = about->height;
  reconfigured++;
  return 0;
}

int cuvidDestroyDecoder(Decoder *decoder) {
  for (int i = 0; i < MOST; i++) {
    if (decoder->taken[i]) mapped--;
    free(decoder->surface[i]), free(decoder->output[i]);
  }
  free(decoder);
  decoders--;
  return 0;
}

int cuvidDecodePicture(Decoder *decoder, Picture *picture) {
  const Header *head = (const Header *)picture->data;
  if (picture->surface >= (int)decoder->surfaces || head->coded_width != (int)decoder->width) return 1;
  memcpy(decoder->surface[picture->surface], picture->data + sizeof *head,
         picture_bytes(decoder->width, decoder->height));
  decoder->status[picture->surface] = head->status;
  return 0;
}

int cuvidGetDecodeStatus(Decoder *decoder, int surface, int *status) {
  int known = decoder->status[surface];
  if (known >= 100 && known < 110) {  /* in progress for that many questions more than 100 */
    *status = 1;
    decoder->status[surface] = known == 100 ? 2 : known - 1;
    return 0;
  }
  *status = known;
  return known == 110;  /* no answer */
}

int cuvidMapVideoFrame64(Decoder *decoder, int surface, unsigned long long *address, unsigned *pitch, void *how) {
  for (unsigned slot = 0; slot < decoder->about.output_surfaces; slot++) {
    if (decoder->taken[slot]) continue;
    *pitch = pitch_of(decoder->width);
    for (unsigned row = 0; row < decoder->height * 3 / 2; row++)
      memcpy(decoder->output[slot] + (size_t)row * *pitch, decoder->surface[surface] + (size_t)row * decoder->width,
             decoder->width);
    decoder->taken[slot] = 1;
    if (++mapped > most_mapped) most_mapped = mapped;
    *address = (unsigned long long)decoder->output[slot];
    return 0;
  }
  return 1;
}

int cuvidUnmapVideoFrame64(Decoder *decoder, unsigned long long address) {
  for (unsigned slot = 0; slot < decoder->about.output_surfaces; slot++)
    if (decoder->taken[slot] && (unsigned long long)decoder->output[slot] == address) {
      memset(decoder->output[slot], 0xEE, (size_t)pitch_of(decoder->about.max_width) * decoder->about.max_height * 3 / 2);
      decoder->taken[slot] = 0, mapped--;
      return 0;
    }
  return 1;
}

int cuvidCreateVideoParser(Parser **made, Parameters *about) {
  Parser *parser = calloc(1, sizeof *parser);
  parser->about = *about;
  parsers++;
  *made = parser;
  return 0;
}

int cuvidDestroyVideoParser(Parser *parser) {
  free(parser);
  parsers--;
  return 0;
}

static int show(Parser *parser, int least) {
  while (parser->waiting > least) {
    int first = 0;
    for (int i = 1; i < parser->waiting; i++)
      if (parser->queue[i].timestamp < parser->queue[first].timestamp) first = i;
    Shown shown = parser->queue[first];
    parser->queue[first] = parser->queue[--parser->waiting];
    if (!parser->about.display(parser->about.user, &shown)) return 1;
  }
  return 0;
}

int cuvidParseVideoData(Parser *parser, Packet *packet) {
  if (packet->flags & 1) return show(parser, 0);
  const Header *head = (const Header *)packet->payload;
  if (packet->size < sizeof *head || (head->magic & ~0x10) != 0x56444d46) return 0;  /* what is no picture goes unnoticed */
  if (head->width != parser->width || head->height != parser->height) {
    Format format = {.codec = parser->about.codec, .progressive = head->interlaced != 1, .surfaces = 3, .chroma = 1,
                     .coded_width = head->coded_width, .coded_height = head->coded_height, .right = head->width,
                     .bottom = head->height};
    parser->surfaces = parser->about.sequence(parser->about.user, &format);
    if (!parser->surfaces) return 1;
    parser->width = head->width, parser->height = head->height;
  }
  for (int busy = 1; busy;) {  /* the next surface that no picture in the queue is in */
    parser->next = (parser->next + 1) % parser->surfaces, busy = 0;
    for (int i = 0; i < parser->waiting; i++) busy |= parser->queue[i].surface == parser->next;
  }
  Picture picture = {.surface = parser->next, .is_field = head->field, .bytes = packet->size, .data = packet->payload};
  if (!parser->about.decode(parser->about.user, &picture)) return 1;
  if (parser->about.codec == 9 && !(head->magic & 0x10)) return 0;
  parser->queue[parser->waiting++] = (Shown){parser->next, head->interlaced != 2, 1, 0,
                                             parser->about.codec > 8 ? 0 : packet->timestamp};
  return show(parser, 1);
}
